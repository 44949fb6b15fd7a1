"""The watchdog: a rank that stands still is named, with its step, its shards and its stack.

Each rank has a thread that puts down in the ranks' common store, ten times in `train.stall_s`, how far its
main thread is and where it stands. Nobody reads it while all goes well. When rank 0 itself stands still it
looks who keeps it waiting, and rank 1 looks too, should rank 0 be the one. A stopped process, or one on a
machine that is gone, tells nothing any more: its last words serve.
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
"""Times `train.stall_s`: a file system may take some minutes to come back, a dead peer never does."""
_SILENT_AFTER = 4
"""Readings in which a rank has said nothing new."""


@dataclass(frozen=True)
class RankStatus:
    """Where a rank stands."""

    rank: int
    host: str
    pid: int
    step: int
    """Being done, from 1."""
    stalled_s: float
    """Since when its main thread has not moved."""
    busy: str
    """What it does that may take long; nothing: a step."""
    waiting: bool
    """For its peers or its device, and so not to blame."""
    validating: bool
    stack: list[str]
    heartbeats: int
    """Of this word, counted up: clocks of two machines are not compared."""
    silent: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        found = "no sign of life" if self.silent else self.busy or "not moving"
        return f"rank {self.rank} (process {self.pid} on {self.host}), step {self.step:,}: {found}"


class Watchdog:
    """Looks after the main threads of a run's ranks while it is entered."""

    def __init__(self, run: Path, ranks: Ranks, stall_s: float, shards: Callable[[int, int], list[str]]):
        """Prepare to watch.

        Args:
            run: Its folder, for `stalls.jsonl`.
            ranks: All of which watch.
            stall_s: Seconds in which a rank must move.
            shards: Gives the names of those that a step, from 0, of a rank reads.
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
            # A connection of its own: the main thread may hold the other one while it waits.
            where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=self._stall_s))
        self.beat(self._step)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        # A thread that Python ends while it is in the store would take the process with it (SIGABRT).
        self._thread.join(self._stall_s)

    def beat(self, step: int | None = None) -> None:
        """Say that this rank's main thread has moved.

        Args:
            step: Which it does now, from 0; none: still the same.
        """
        self._moved = time.monotonic()
        if step is not None:
            self._step = step

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Take no offence at this rank while it does what may take long.

        Args:
            what: In words, such as `scoring`.
        """
        self._busy = what
        yield
        self._busy = ""
        self.beat()

    def _watch(self) -> None:
        told, looked = False, time.monotonic()
        while not self._over.wait(self._stall_s / 10):
            before, looked = looked, time.monotonic()
            # The whole process stood still, as after Ctrl-Z or when SLURM suspends a job; or a shard is on
            # its way, which gives up by itself if nothing comes.
            if looked - before > self._stall_s or self._downloads():
                self.beat()
            mine = self._state()
            try:
                if self._store is not None:
                    self._store.set(_key(self._rank), json.dumps(asdict(mine)))
                # Rank 1 counts from half the time on what the others say, to know the silent ones.
                if self._rank > 1 or mine.stalled_s < self._stall_s / 2:
                    self._heard, told = {}, False
                    continue
                states = [mine, *self._others()]
            except RuntimeError:
                return  # The store is gone: the run is ending.
            culprits = _blame(states, self._stall_s)
            if self._over.is_set() or mine.stalled_s < self._stall_s or not culprits:
                continue
            if self._rank == 1 and not any(state.rank == 0 and state.silent for state in states):
                continue
            stalled_s = min([mine.stalled_s, *(state.stalled_s for state in culprits if not state.silent)])
            # A file system may come back even then.
            end = stalled_s > _END_AFTER * self._stall_s and not any(state.busy for state in culprits)
            if end or not told:
                self._tell(states, culprits, stalled_s, end)
                told = True
            if end:
                # The launcher ends the others; nothing else gets the main thread out of where it hangs.
                os._exit(1)

    def _downloads(self) -> bool:
        """Return whether the main thread waits for pictures, and another one for a shard to come."""
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
        """Yield what the other ranks last said, and whether they still speak."""
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
            lines += ["  ending the run; the same command goes on from its last checkpoint"]
        say(*lines)
        record = {"time": time.time(), "stalled_s": stalled_s, "stalled": stalled, "waiting": waiting}
        # What keeps the run from moving may be a full disk.
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _blame(states: list[RankStatus], stall_s: float) -> list[RankStatus]:
    """Return those whom the others wait for; nobody, while they move or are busy, but for very long."""
    if silent := [state for state in states if state.silent]:
        return silent
    if any(state.busy for state in states):
        return [state for state in states if state.busy and state.stalled_s >= _END_AFTER * stall_s]
    # Where steps are queued on a device, those who wait are ahead of the one that keeps them waiting.
    last = min(state.step for state in states)
    behind = [state for state in states if state.step == last]
    awaited = [state for state in behind if not state.waiting] or behind
    return [state for state in awaited if state.stalled_s >= stall_s]


def _files(thread: FrameType) -> list[str]:
    """Return the source files that a thread is in, the innermost first."""
    return [frame.f_code.co_filename for frame, _ in traceback.walk_stack(thread)]


def _key(rank: int) -> str:
    return f"captionscale/watchdog/{rank}"
