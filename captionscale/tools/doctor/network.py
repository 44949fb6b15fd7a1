"""Checks between the nodes of a job: each adds up numbers with each other one, two at a time.

A collective of all nodes would only hang if one is dead. Pairs meet through a store on the first node, each
in a group of its own with a deadline, so that a dead or slow way is known by its two ends.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from captionscale.tools.doctor.report import CheckResult, failure, ok, warning

_MEET_S, _PAIR_S, _ALL_S = 20.0, 5.0, 20.0
_NUMBERS, _TIMES = 1 << 20, 3
"""Of four bytes, and how often they are summed up."""
_SLOW = 4
"""Times slower than the others' median."""


@dataclass(frozen=True)
class Rendezvous:
    """The nodes of a job that have come together."""

    store: TCPStore
    node: int
    count: int
    hosts: dict[int, str]
    """By their numbers, of those that came."""

    @property
    def is_main(self) -> bool:
        """Whether this node speaks for all."""
        return self.node == 0

    def gather(self, lines: list[dict[str, object]], timeout_s: float) -> list[dict[str, object]]:
        """Give lines to the first node, which returns those of the others that came in time."""
        if not self.is_main:
            self.store.set(f"lines/{self.node}", json.dumps(lines))
            return []
        others, deadline = [], time.monotonic() + timeout_s
        for node, host in self.hosts.items():
            key = f"lines/{node}"
            if node and _wait(self.store, key, deadline):
                others += json.loads(self.store.get(key))
            elif node:
                late = warning(f"{host} has said nothing within {timeout_s:g} s", "look at that machine")
                others.append({**vars(late), "check": "nodes", "host": host, "measured": False})
        return others

    def share_verdict(self, refused: bool, timeout_s: float) -> bool:
        """Return the first node's verdict on all of them, or this node's own if that one is gone."""
        if self.is_main:
            self.store.set("verdict", str(int(refused)))
            deadline = time.monotonic() + _PAIR_S
            # The store goes with this process.
            for node in self.hosts:
                if node:
                    _wait(self.store, f"heard/{node}", deadline)
            return refused
        if not _wait(self.store, "verdict", time.monotonic() + timeout_s):
            return refused
        refused = self.store.get("verdict") == b"1"
        self.store.set(f"heard/{self.node}", "1")
        return refused


def rendezvous(node: int, count: int, address: str, port: int) -> Rendezvous:
    """Meet the other nodes; whoever has not come within a deadline is left out.

    Raises:
        RuntimeError: The first node cannot be reached, or did not wait for this one.
    """
    patience = timedelta(seconds=_MEET_S)
    store = TCPStore(address, port, None, node == 0, timeout=patience, wait_for_workers=False)
    store.set(f"here/{node}", os.uname().nodename)
    if node == 0:
        deadline = time.monotonic() + _MEET_S
        came = [each for each in range(count) if _wait(store, f"here/{each}", deadline)]
        store.set("came", json.dumps(came))
    elif not _wait(store, "came", time.monotonic() + 2 * _MEET_S):
        raise RuntimeError(f"the first node, {address}, is silent")
    arrived = json.loads(store.get("came"))
    if node not in arrived:
        raise RuntimeError(f"this node came more than {_MEET_S:g} s after the first one")
    names = {each: store.get(f"here/{each}").decode() for each in arrived}
    # On a test's one machine all have the same name.
    same = len(set(names.values())) < len(names)
    return Rendezvous(
        store, node, count, {each: f"{name}#{each}" if same else name for each, name in names.items()}
    )


def check_links(meeting: Rendezvous) -> Iterator[CheckResult]:
    """Sum up numbers between every two nodes, and name the ways that are dead or slow.

    All nodes call it; the first one has something to say.
    """
    mine: dict[str, float | str] = {}
    deadline = time.monotonic() + _ALL_S
    for left, right in _rounds(sorted(meeting.hosts), meeting.node):
        if time.monotonic() > deadline:
            break
        mine[f"{left}-{right}"] = _sum_up(meeting, left, right)
    meeting.store.set(f"pairs/{meeting.node}", json.dumps(mine))
    if meeting.is_main:
        found: dict[str, float | str] = {}
        for node in meeting.hosts:
            if _wait(meeting.store, f"pairs/{node}", deadline + 2 * _PAIR_S):
                for pair, value in json.loads(meeting.store.get(f"pairs/{node}")).items():
                    # What one of them calls dead is dead.
                    found[pair] = value if pair not in found or isinstance(value, str) else found[pair]
        yield from report_links(meeting.hosts, meeting.count, found)


def report_links(hosts: dict[int, str], count: int, found: dict[str, float | str]) -> Iterator[CheckResult]:
    """Say what was found between nodes.

    Args:
        hosts: Those that came, by number.
        count: Those that were to come.
        found: Bytes per second of each pair such as `0-1`, or why there are none.
    """
    cure = (
        "look at the network between them (interfaces: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), or leave a"
        " node out"
    )
    for node in sorted(set(range(count)) - hosts.keys()):
        yield failure(
            f"node {node} of {count} did not come within {_MEET_S:g} s", "look at that machine; --exclude it"
        )

    def name(pair: str) -> str:
        left, right = map(int, pair.split("-"))
        return f"{hosts[left]} and {hosts[right]}"

    paces = {pair: value for pair, value in found.items() if not isinstance(value, str)}
    usual = median(paces.values()) if paces else 0.0
    for pair, value in sorted(found.items()):
        if isinstance(value, str):
            yield failure(f"no all-reduce between {name(pair)} ({value})", cure)
        elif value < usual / _SLOW:
            yield warning(
                f"all-reduce between {name(pair)}: {value / 1e6:,.0f} MB/s, the usual is {usual / 1e6:,.0f}",
                cure,
            )
    wanted = len(hosts) * (len(hosts) - 1) // 2
    if paces:
        told = "" if len(found) == wanted else f" of {wanted}, for want of time,"
        yield ok(
            f"all-reduce between {len(paces)} pairs{told} of {len(hosts)} nodes, over gloo (TCP): usually"
            f" {usual / 1e6:,.0f} MB/s, the slowest {min(paces.values()) / 1e6:,.0f}"
        )


def _rounds(nodes: list[int], node: int) -> Iterator[tuple[int, int]]:
    """Yield a node's pairs, in an order in which no node has two at a time: a round-robin tournament."""
    ring: list[int | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    for _ in range(len(ring) - 1):
        partner = ring[len(ring) - 1 - ring.index(node)]
        if partner is not None:
            yield min(node, partner), max(node, partner)
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _sum_up(meeting: Rendezvous, left: int, right: int) -> float | str:
    """Return the bytes per second of an all-reduce between this node and another, or why there is none."""
    store = PrefixStore(f"pair/{left}-{right}", meeting.store)
    patience = timedelta(seconds=_PAIR_S)
    place = int(meeting.node == right)
    try:
        group: Any = ProcessGroupGloo(store, place, 2, patience)
        numbers = torch.ones(_NUMBERS)
        group.allreduce([numbers]).wait()
        began = time.monotonic()
        for _ in range(_TIMES):
            group.allreduce([numbers]).wait()
        pace = _TIMES * numbers.nbytes / (time.monotonic() - began)
    except RuntimeError as error:
        return " ".join(str(error).splitlines()[0].split())[:160]
    return pace if bool((numbers == 2.0 ** (_TIMES + 1)).all()) else "wrong sums"


def _wait(store: TCPStore, key: str, deadline: float) -> bool:
    """Return whether a key is there before the deadline."""
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
