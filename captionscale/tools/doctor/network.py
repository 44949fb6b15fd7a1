"""Checks of the network between the nodes of a job: an all-reduce of each pair of nodes.

A collective of all nodes would hang if one is dead. Each pair has its own process group with a timeout, so a
dead or slow link is named by its two ends.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from statistics import median
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from captionscale.tools.doctor.report import CheckResult, failure, ok, warning

_MEET_S, _PAIR_S, _ALL_S = 20.0, 5.0, 20.0
_NUMBERS, _TIMES = 1 << 20, 3
"""Four-byte elements of an all-reduce, and its repetitions."""
_SLOW = 4
"""Factor below the median speed."""


@dataclass(frozen=True)
class Rendezvous:
    """The nodes of a job that have connected."""

    store: TCPStore
    node: int
    count: int
    hosts: dict[int, str]
    """Names by node index, of those that connected."""

    @property
    def is_main(self) -> bool:
        """Whether this node prints for all."""
        return self.node == 0

    def gather(self, results: list[CheckResult], timeout_s: float) -> list[CheckResult]:
        """Send results to the first node, which returns those that arrived in time."""
        if not self.is_main:
            self.store.set(f"results/{self.node}", json.dumps([asdict(result) for result in results]))
            return []
        others, deadline = [], time.monotonic() + timeout_s
        for node, host in self.hosts.items():
            if node and _wait(self.store, f"results/{node}", deadline):
                others += [CheckResult(**fields) for fields in json.loads(self.store.get(f"results/{node}"))]
            elif node:
                late = warning(f"{host} has not answered within {timeout_s:g} s", "check that node")
                others.append(replace(late, check="nodes", host=host, measured=False))
        return others

    def share_verdict(self, failed: bool, timeout_s: float) -> bool:
        """Return the first node's verdict on all, or this node's own if the first is gone."""
        if self.is_main:
            self.store.set("verdict", str(int(failed)))
            deadline = time.monotonic() + _PAIR_S
            # The store ends with this process.
            for node in self.hosts.keys() - {0}:
                _wait(self.store, f"received/{node}", deadline)
            return failed
        if not _wait(self.store, "verdict", time.monotonic() + timeout_s):
            return failed
        failed = self.store.get("verdict") == b"1"
        self.store.set(f"received/{self.node}", "1")
        return failed


def rendezvous(node: int, count: int, address: str, port: int) -> Rendezvous:
    """Connect to the other nodes; those that are late are left out.

    Raises:
        RuntimeError: The first node cannot be reached, or did not wait for this one.
    """
    timeout = timedelta(seconds=_MEET_S)
    store = TCPStore(address, port, None, node == 0, timeout=timeout, wait_for_workers=False)
    store.set(f"host/{node}", os.uname().nodename)
    if node == 0:
        deadline = time.monotonic() + _MEET_S
        connected = [each for each in range(count) if _wait(store, f"host/{each}", deadline)]
        store.set("connected", json.dumps(connected))
    elif not _wait(store, "connected", time.monotonic() + 2 * _MEET_S):
        raise RuntimeError(f"the first node, {address}, does not answer")
    hosts = {each: store.get(f"host/{each}").decode() for each in json.loads(store.get("connected"))}
    if node not in hosts:
        raise RuntimeError(f"this node connected more than {_MEET_S:g} s after the first one")
    # In tests all nodes are one machine.
    if len(set(hosts.values())) < len(hosts):
        hosts = {each: f"{host}#{each}" for each, host in hosts.items()}
    return Rendezvous(store, node, count, hosts)


def check_links(nodes: Rendezvous) -> Iterator[CheckResult]:
    """Run an all-reduce between every two nodes; all call it, and the first yields dead and slow links."""
    own: dict[str, float | str] = {}
    deadline = time.monotonic() + _ALL_S
    for left, right in _rounds(sorted(nodes.hosts), nodes.node):
        if time.monotonic() > deadline:
            break
        own[f"{left}-{right}"] = _all_reduce_speed(nodes, left, right)
    nodes.store.set(f"pairs/{nodes.node}", json.dumps(own))
    if not nodes.is_main:
        return
    speeds: dict[str, float | str] = {}
    for node in nodes.hosts:
        if _wait(nodes.store, f"pairs/{node}", deadline + 2 * _PAIR_S):
            for pair, value in json.loads(nodes.store.get(f"pairs/{node}")).items():
                # An error at one end suffices.
                if isinstance(value, str) or pair not in speeds:
                    speeds[pair] = value
    yield from report_links(nodes.hosts, nodes.count, speeds)


def report_links(hosts: dict[int, str], count: int, speeds: dict[str, float | str]) -> Iterator[CheckResult]:
    """Yield the results of all pairs of nodes.

    Args:
        hosts: Connected nodes by index.
        count: Expected number of nodes.
        speeds: Bytes per second of each pair such as `0-1`, or an error.
    """
    cure = (
        "check the network between them (interfaces: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), or exclude one"
        " of them"
    )
    for node in sorted(set(range(count)) - hosts.keys()):
        yield failure(
            f"node {node} of {count} did not connect within {_MEET_S:g} s", "check that node, or --exclude it"
        )
    measured = [speed for speed in speeds.values() if not isinstance(speed, str)]
    usual = median(measured) if measured else 0.0
    for pair, speed in sorted(speeds.items()):
        ends = " and ".join(hosts[int(node)] for node in pair.split("-"))
        if isinstance(speed, str):
            yield failure(f"no all-reduce between {ends} ({speed})", cure)
        elif speed < usual / _SLOW:
            yield warning(
                f"all-reduce between {ends}: {speed / 1e6:,.0f} MB/s, the median is {usual / 1e6:,.0f}", cure
            )
    pairs = len(hosts) * (len(hosts) - 1) // 2
    if measured:
        partial = "" if len(speeds) == pairs else f" of {pairs}, for lack of time,"
        yield ok(
            f"all-reduce between {len(measured)} pairs{partial} of {len(hosts)} nodes, over gloo (TCP):"
            f" median {usual / 1e6:,.0f} MB/s, slowest {min(measured) / 1e6:,.0f}"
        )


def _rounds(nodes: list[int], node: int) -> Iterator[tuple[int, int]]:
    """Yield a node's pairs in the order of a round-robin tournament: no node has two at a time."""
    ring: list[int | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    for _ in range(len(ring) - 1):
        partner = ring[len(ring) - 1 - ring.index(node)]
        if partner is not None:
            yield min(node, partner), max(node, partner)
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _all_reduce_speed(nodes: Rendezvous, left: int, right: int) -> float | str:
    """Return the bytes per second of an all-reduce between this node and another, or the error."""
    store = PrefixStore(f"pair/{left}-{right}", nodes.store)
    timeout = timedelta(seconds=_PAIR_S)
    rank = int(nodes.node == right)
    try:
        group: Any = ProcessGroupGloo(store, rank, 2, timeout)
        numbers = torch.ones(_NUMBERS)
        group.allreduce([numbers]).wait()
        began = time.monotonic()
        for _ in range(_TIMES):
            group.allreduce([numbers]).wait()
        speed = _TIMES * numbers.nbytes / (time.monotonic() - began)
    except RuntimeError as error:
        return " ".join(str(error).splitlines()[0].split())[:160]
    return speed if bool((numbers == 2.0 ** (_TIMES + 1)).all()) else "wrong sums"


def _wait(store: TCPStore, key: str, deadline: float) -> bool:
    """Return whether a key is set before the deadline."""
    while not (found := bool(store.check([key]))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
