"""The watchdog names a stalled rank, with its step, shards and stack.

A thread of each rank writes the state of its main thread to a common store, ten times in `train.stall_s`.
When rank 0 stalls, it reads the states of the others to find the rank it waits for; rank 1 does so too, in
case that is rank 0. Of a process that is stopped or gone, the last state is used.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from captionscale.data import loader, shard_cache
from captionscale.distributed import engine, ranks
from captionscale.distributed.ranks import Ranks
from captionscale.progress import say
from captionscale.train.generation import caption_split
from captionscale.train.run_folder import STALLS_FILE

_PACKAGE = str(Path(__file__).parents[1])
_COLLECTIVE = (str(ranks.__file__), str(engine.__file__))
_LOADER, _CACHE = str(loader.__file__), str(shard_cache.__file__)
_END_AFTER = 10
"""Times `train.stall_s`: a file system may recover after minutes, a dead peer never does."""
_SILENT_AFTER = 4
"""Readings without a new heartbeat."""


@dataclass(frozen=True)
class RankStatus:
    """State of a rank."""

    rank: int
    host: str
    pid: int
    step: int
    """Current one, from 1."""
    stalled_s: float
    """Seconds since the last heartbeat of its main thread."""
    busy: str
    """Work that may take long; empty in a step."""
    waiting: bool
    """For its peers or its device, so it is not the cause."""
    validating: bool
    stack: list[str]
    heartbeats: int
    """Number of states written: clocks of two machines are not compared."""
    silent: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        found = "no sign of life" if self.silent else self.busy or "not moving"
        return f"rank {self.rank} (process {self.pid} on {self.host}), step {self.step:,}: {found}"


class Watchdog:
    """Watches the main threads of all ranks while entered."""

    def __init__(self, run: Path, ranks: Ranks, stall_s: float, shards: Callable[[int, int], list[str]]):
        """Prepare to watch.

        Args:
            run: Folder for `stalls.jsonl`.
            ranks: This process and its peers.
            stall_s: Seconds without a heartbeat after which a rank is stalled.
            shards: Returns the names of the shards read in a step (from 0) by a rank.
        """
        self._path, self._rank, self._size = run / STALLS_FILE, ranks.rank, ranks.world_size
        self._stall_s, self._shards = stall_s, shards
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._moved, self._step, self._busy, self._number = time.monotonic(), 0, "", 0
        self._heard: dict[int, tuple[int, int]] = {}
        self._store: TCPStore | None = None

    def __enter__(self) -> "Watchdog":
        if self._size > 1:
            # Its own connection: the main thread may hold the other one while it waits.
            where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=self._stall_s))
        self.beat(self._step)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        # Python ending a thread inside the store would abort the process (SIGABRT).
        self._thread.join(self._stall_s)

    def beat(self, step: int | None = None) -> None:
        """Record a heartbeat of the main thread, and the step (from 0) if it has changed."""
        self._moved = time.monotonic()
        if step is not None:
            self._step = step

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Tolerate a long wait for work such as `scoring`."""
        self._busy = what
        yield
        self._busy = ""
        self.beat()

    def _watch(self) -> None:
        told, looked = False, time.monotonic()
        while not self._over.wait(self._stall_s / 10):
            before, looked = looked, time.monotonic()
            # The whole process was suspended (Ctrl-Z, SLURM), or a download runs, which has its own timeout.
            if looked - before > self._stall_s or self._downloads():
                self.beat()
            mine = self._state()
            try:
                if self._store is not None:
                    self._store.set(_key(self._rank), json.dumps(asdict(mine)))
                # From half the time on, to count the heartbeats of the others.
                if self._rank > 1 or mine.stalled_s < self._stall_s / 2:
                    self._heard, told = {}, False
                    continue
                states = [mine, *self._others()]
            except RuntimeError:
                return  # The store is gone: the run ends.
            culprits = _blame(states, self._stall_s)
            if self._over.is_set() or mine.stalled_s < self._stall_s or not culprits:
                continue
            if self._rank == 1 and not any(state.rank == 0 and state.silent for state in states):
                continue
            stalled_s = min([mine.stalled_s, *(state.stalled_s for state in culprits if not state.silent)])
            # A file system may recover even then.
            end = stalled_s > _END_AFTER * self._stall_s and not any(state.busy for state in culprits)
            if end or not told:
                self._tell(states, culprits, stalled_s, end)
                told = True
            if end:
                # The launcher ends the others; nothing else ends a hanging main thread.
                os._exit(1)

    def _downloads(self) -> bool:
        """Return whether the main thread waits for images while another one downloads a shard."""
        threads = sys._current_frames()
        main = [name for name in _files(threads[self._main]) if name.startswith(_PACKAGE)]
        return main[:1] == [_LOADER] and any(_CACHE in _files(thread) for thread in threads.values())

    def _state(self) -> RankStatus:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
        innermost = ours[-1] if ours else frames[-1]
        line = innermost.line or ""
        waiting = innermost.filename in _COLLECTIVE or ".item()" in line or ".synchronize()" in line
        validating = any(frame.name == caption_split.__name__ for frame in ours)
        stack = [f"{Path(it.filename).name}:{it.lineno} in {it.name}: {it.line}" for it in frames[-12:]]
        self._number += 1
        still = time.monotonic() - self._moved
        host = os.uname().nodename
        return RankStatus(
            self._rank,
            host,
            os.getpid(),
            self._step + 1,
            still,
            self._busy,
            waiting,
            validating,
            stack,
            self._number,
        )

    def _others(self) -> Iterator[RankStatus]:
        """Yield the last states of the other ranks, marked if they are silent."""
        store = self._store
        if store is None:
            return
        for rank in range(self._size):
            if rank == self._rank or not store.check([_key(rank)]):
                continue
            state = RankStatus(**json.loads(store.get(_key(rank))))
            number, times = self._heard.get(rank, (0, 0))
            times = times + 1 if number == state.heartbeats else 0
            self._heard[rank] = state.heartbeats, times
            yield RankStatus(**{**asdict(state), "silent": times >= _SILENT_AFTER})

    def _tell(
        self, states: list[RankStatus], culprits: list[RankStatus], stalled_s: float, end: bool
    ) -> None:
        lines = [f"captionscale: no progress for {stalled_s:,.0f} s:"]
        stalled = []
        for state in culprits:
            shards = [] if state.validating else self._shards(state.step - 1, state.rank)
            stalled.append({**asdict(state), "shards": shards})
            reads = f"it reads {', '.join(shards)}" if shards else "it captions the validation split"
            lines += [f"  {state}; {reads}; its stack:"]
            lines += [f"    {line}" for line in state.stack]
        waiting = sorted({state.rank for state in states} - {state.rank for state in culprits})
        if waiting:
            lines += [f"  waiting for it: ranks {', '.join(map(str, waiting))}"]
        if end:
            lines += ["  ending the run; the same command resumes from the last checkpoint"]
        say(*lines)
        record = {"time": time.time(), "stalled_s": stalled_s, "stalled": stalled, "waiting": waiting}
        # The cause may be a full disk.
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _blame(states: list[RankStatus], stall_s: float) -> list[RankStatus]:
    """Return the ranks that the others wait for; none while they progress or may be busy."""
    if silent := [state for state in states if state.silent]:
        return silent
    if any(state.busy for state in states):
        return [state for state in states if state.busy and state.stalled_s >= _END_AFTER * stall_s]
    # With steps queued on a device, waiting ranks are ahead of the one they wait for.
    last = min(state.step for state in states)
    behind = [state for state in states if state.step == last]
    awaited = [state for state in behind if not state.waiting] or behind
    return [state for state in awaited if state.stalled_s >= stall_s]


def _files(thread: FrameType) -> list[str]:
    """Return the source files that a thread is in, the innermost first."""
    return [frame.f_code.co_filename for frame, _ in traceback.walk_stack(thread)]


def _key(rank: int) -> str:
    return f"captionscale/watchdog/{rank}"
