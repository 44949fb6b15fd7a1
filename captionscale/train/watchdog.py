"""The watchdog names a stalled rank, with its step, shards and stack.

A thread of each rank writes the status of its main thread to a common store, ten times in `train.stall_s`.
When rank 0 stalls, it reads the status of the others to find the rank that it waits for; rank 1 does so too,
in case that is rank 0.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from captionscale.data import loader, shard_cache
from captionscale.distributed import engine, ranks
from captionscale.distributed.ranks import Ranks
from captionscale.files import append_lines
from captionscale.progress import say
from captionscale.train.generation import caption_split
from captionscale.train.run_folder import STALLS_FILE

_PACKAGE = str(Path(__file__).parents[1])
_COLLECTIVE = (str(ranks.__file__), str(engine.__file__))
_LOADER, _CACHE = str(loader.__file__), str(shard_cache.__file__)
_EXIT_AFTER = 10
"""Times `train.stall_s`: a file system may recover after minutes, a dead peer never does."""
_SILENT_AFTER = 4
"""Readings of an unchanged status."""


@dataclass(frozen=True)
class RankStatus:
    """Status of a rank."""

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
    """Number of times written: clocks of two machines are not compared."""
    silent: bool = False
    """It no longer writes its status."""

    def __str__(self) -> str:
        found = "sends no heartbeat" if self.silent else self.busy or "makes no progress"
        return f"rank {self.rank} (process {self.pid} on {self.host}), step {self.step:,}: {found}"


class Watchdog:
    """Watches the main threads of all ranks while entered."""

    def __init__(self, run: Path, ranks: Ranks, stall_s: float, shards: Callable[[int, int], list[str]]):
        """Prepare to watch; `shards` returns the names of the shards that a rank reads in a step (from 0)."""
        self._path, self._rank, self._world_size = run / STALLS_FILE, ranks.rank, ranks.world_size
        self._stall_s, self._shards = stall_s, shards
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._beat_at, self._step, self._busy, self._heartbeats = time.monotonic(), 0, "", 0
        # Heartbeats of each other rank when last read, and how often they were read.
        self._read: dict[int, tuple[int, int]] = {}
        self._store: TCPStore | None = None

    def __enter__(self) -> "Watchdog":
        if self._world_size > 1:
            # Its own connection: the main thread may hold the other one while it waits.
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=self._stall_s))
        self.beat(self._step)
        # At once, or the others could not tell that this rank stopped before its first one.
        self._publish(self._status())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # Python ending a thread inside the store would abort the process (SIGABRT).
        self._thread.join(self._stall_s)

    def beat(self, step: int | None = None) -> None:
        """Record a heartbeat of the main thread, and the step (from 0) if it has changed."""
        self._beat_at = time.monotonic()
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
        reported, now = False, time.monotonic()
        while not self._stop.wait(self._stall_s / 10):
            before, now = now, time.monotonic()
            # The whole process was suspended (Ctrl-Z, SLURM), or a download runs, which has its own timeout.
            if now - before > self._stall_s or self._is_downloading():
                self.beat()
            own = self._status()
            try:
                self._publish(own)
                # From half the time on, to count the heartbeats of the others.
                if self._rank > 1 or own.stalled_s < self._stall_s / 2:
                    self._read, reported = {}, False
                    continue
                statuses = [own, *self._others()]
            except RuntimeError:
                return  # The store is gone: the run ends.
            culprits = _blame(statuses, self._stall_s)
            if self._stop.is_set() or own.stalled_s < self._stall_s or not culprits:
                continue
            if self._rank == 1 and not any(each.rank == 0 and each.silent for each in statuses):
                continue
            stalled_s = min([own.stalled_s, *(each.stalled_s for each in culprits if not each.silent)])
            # Long work may still end.
            ends = stalled_s > _EXIT_AFTER * self._stall_s and not any(each.busy for each in culprits)
            if ends or not reported:
                self._report(statuses, culprits, stalled_s, ends)
                reported = True
            if ends:
                # The launcher ends the others; nothing else ends a hanging main thread.
                os._exit(1)

    def _publish(self, status: RankStatus) -> None:
        if self._store is not None:
            self._store.set(_key(self._rank), json.dumps(asdict(status)))

    def _is_downloading(self) -> bool:
        """Return whether the main thread waits for images while another one downloads a shard."""
        threads = sys._current_frames()
        main = [name for name in _files(threads[self._main]) if name.startswith(_PACKAGE)]
        return main[:1] == [_LOADER] and any(_CACHE in _files(thread) for thread in threads.values())

    def _status(self) -> RankStatus:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
        innermost = ours[-1] if ours else frames[-1]
        line = innermost.line or ""
        self._heartbeats += 1
        return RankStatus(
            rank=self._rank,
            host=os.uname().nodename,
            pid=os.getpid(),
            step=self._step + 1,
            stalled_s=time.monotonic() - self._beat_at,
            busy=self._busy,
            waiting=innermost.filename in _COLLECTIVE or ".item()" in line or ".synchronize()" in line,
            validating=any(frame.name == caption_split.__name__ for frame in ours),
            stack=[f"{Path(it.filename).name}:{it.lineno} in {it.name}: {it.line}" for it in frames[-12:]],
            heartbeats=self._heartbeats,
        )

    def _others(self) -> Iterator[RankStatus]:
        """Yield the last status of each other rank."""
        for rank in range(self._world_size):
            if self._store is None or rank == self._rank or not self._store.check([_key(rank)]):
                continue
            status = RankStatus(**json.loads(self._store.get(_key(rank))))
            heartbeats, times = self._read.get(rank, (0, 0))
            times = times + 1 if heartbeats == status.heartbeats else 0
            self._read[rank] = status.heartbeats, times
            yield replace(status, silent=times >= _SILENT_AFTER)

    def _report(
        self, statuses: list[RankStatus], culprits: list[RankStatus], stalled_s: float, ends: bool
    ) -> None:
        lines, stalled = [f"captionscale: no progress for {stalled_s:,.0f} s:"], []
        for each in culprits:
            shards = [] if each.validating else self._shards(each.step - 1, each.rank)
            stalled.append({**asdict(each), "shards": shards})
            reads = f"it reads {', '.join(shards)}" if shards else "it captions the validation split"
            lines += [f"  {each}; {reads}; its stack:", *(f"    {line}" for line in each.stack)]
        waiting = sorted({each.rank for each in statuses} - {each.rank for each in culprits})
        if waiting:
            lines.append(f"  waiting for it: ranks {', '.join(map(str, waiting))}")
        if ends:
            lines.append("  ending the run; the same command resumes from the last checkpoint")
        say(*lines)
        record = {"time": time.time(), "stalled_s": stalled_s, "stalled": stalled, "waiting": waiting}
        # The cause may be a full disk.
        with suppress(OSError):
            append_lines(self._path, json.dumps(record).encode())


def _blame(statuses: list[RankStatus], stall_s: float) -> list[RankStatus]:
    """Return the ranks that the others wait for; none while they progress or may be busy."""
    if silent := [each for each in statuses if each.silent]:
        return silent
    if busy := [each for each in statuses if each.busy]:
        return [each for each in busy if each.stalled_s >= _EXIT_AFTER * stall_s]
    # With steps queued on a device, waiting ranks are ahead of the one they wait for.
    step = min(each.step for each in statuses)
    behind = [each for each in statuses if each.step == step]
    awaited = [each for each in behind if not each.waiting] or behind
    return [each for each in awaited if each.stalled_s >= stall_s]


def _files(thread: FrameType) -> list[str]:
    """Return the source files that a thread is in, the innermost first."""
    return [frame.f_code.co_filename for frame, _ in traceback.walk_stack(thread)]


def _key(rank: int) -> str:
    return f"captionscale/watchdog/{rank}"
