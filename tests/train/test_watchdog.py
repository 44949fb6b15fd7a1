import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment import logged_losses, tiny_config

from captionscale.config import Data
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.distributed.ranks import Ranks
from captionscale.train import watchdog as watchdog_module
from captionscale.train.setup import make_sampler
from captionscale.train.watchdog import STALLS_FILE, RankStatus, Watchdog, _blame
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary

CALM = RankStatus(
    rank=0,
    host="gpu01",
    pid=7,
    step=5,
    stalled_s=60.0,
    busy="",
    waiting=True,
    validating=False,
    stack=[],
    heartbeats=1,
)


@pytest.mark.parametrize(
    ("others", "blamed"),
    [
        # It sends no heartbeat.
        ([replace(CALM, rank=1, silent=True), replace(CALM, rank=2, waiting=False)], [1]),
        # It does not wait.
        ([replace(CALM, rank=1), replace(CALM, rank=2, waiting=False)], [2]),
        # On GPUs waiting ranks have queued the next step, and are anywhere in it.
        ([replace(CALM, rank=1, step=4), replace(CALM, rank=2, waiting=False)], [1]),
        # It scores, which has no time limit.
        ([replace(CALM, rank=1, busy="scoring"), replace(CALM, rank=2)], []),
        # All wait for each other.
        ([replace(CALM, rank=1)], [0, 1]),
        # It is slow, as its part of a validation takes longer, but it makes progress.
        ([replace(CALM, rank=1, waiting=False, validating=True, stalled_s=1.0)], []),
    ],
)
def test_the_rank_that_the_others_wait_for_is_blamed(others: list[RankStatus], blamed: list[int]) -> None:
    assert [state.rank for state in _blame([CALM, *others], 45.0)] == blamed


class Clock(threading.Event):
    """A watchdog's clock and event: time passes when a test says so, not while the machine is busy."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._granted, self._idle = threading.Semaphore(0), threading.Semaphore(0)

    def monotonic(self) -> float:
        return self._now

    def time(self) -> float:
        return self._now

    def wait(self, timeout: float | None = None) -> bool:
        self._idle.release()
        self._granted.acquire()
        self._now += timeout or 0
        return self.is_set()

    def set(self) -> None:
        super().set()
        self._granted.release()

    def skip(self, seconds: float) -> None:
        """Let time pass in which the thread of the watchdog does not run either."""
        self._now += seconds

    def tick(self, count: int) -> None:
        """Have the watchdog check so many times; return when it has."""
        for _ in range(count):
            assert self._idle.acquire(timeout=600)
            self._granted.release()
        assert self._idle.acquire(timeout=600)
        self._idle.release()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog_module, "time", clock)
    return clock


def watch(clock: Clock, *arguments: Any) -> Watchdog:
    """Return a watchdog that checks when the clock ticks."""
    watchdog = Watchdog(*arguments)
    watchdog._stop = clock
    return watchdog


def test_a_stalled_process_is_reported_once_with_its_stack_and_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    def shards(step: int, rank: int) -> list[str]:
        return [f"train-of-step-{step}-and-rank-{rank}.tar"]

    with Ranks() as ranks, watch(clock, tmp_path, ranks, 0.5, shards) as watchdog:
        for _ in range(10):
            # It checks ten times in half a second.
            clock.tick(9)
            watchdog.beat(6)
        with watchdog.busy("scoring"):
            clock.tick(20)
        assert not (tmp_path / STALLS_FILE).exists()
        clock.tick(20)
    (line,) = (tmp_path / STALLS_FILE).read_text().splitlines()
    (stalled,) = json.loads(line)["stalled"]
    assert (stalled["rank"], stalled["step"]) == (0, 7)
    assert stalled["shards"] == ["train-of-step-6-and-rank-0.tar"]
    assert any("clock.tick(20)" in line for line in stalled["stack"])
    stderr = capsys.readouterr().err
    assert "rank 0" in stderr
    assert "train-of-step-6-and-rank-0.tar" in stderr


def test_a_process_that_never_recovers_exits_with_an_error(tmp_path: Path, clock: Clock) -> None:
    def hang() -> None:
        with watch(clock, tmp_path, ranks, 0.2, lambda step, rank: [f"{step}-{rank}.tar"]):
            clock.tick(1000)

    with Ranks() as ranks:
        process = multiprocessing.get_context("fork").Process(target=hang)
        process.start()
        process.join(600)
    assert process.exitcode == 1
    warned, ended = [
        json.loads(line)["stalled_s"] for line in (tmp_path / STALLS_FILE).read_text().splitlines()
    ]
    assert 0.2 <= warned < 2 <= ended


def test_a_suspended_process_is_no_stall(tmp_path: Path, clock: Clock) -> None:
    # By Ctrl-Z, or where SLURM suspends a job.
    def work() -> None:
        with watch(clock, tmp_path, ranks, 0.2, lambda *_: []) as watchdog:
            clock.tick(1)
            watchdog.beat(1)
            clock.skip(2.5)
            clock.tick(5)

    with Ranks() as ranks:
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(600)
    assert process.exitcode == 0


def test_a_slow_download_is_no_stall(packed: Path, tmp_path: Path, clock: Clock) -> None:
    class Slow(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".tar"):
                clock.tick(50)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(packed))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        split = Split(open_storage(url, tmp_path / "cache"), "train")
        data = Data(shards=url, image_size=32, workers=1)
        with (
            closing(Loader(split, Vocabulary(SPECIAL_TOKENS), data)) as reader,
            Ranks() as ranks,
            watch(clock, tmp_path, ranks, 0.3, lambda *_: []),
        ):
            assert len(list(reader.prefetch([(np.array([0]), 0)]))) == 1
        server.shutdown()
    assert not (tmp_path / STALLS_FILE).exists()


def status_of(process: int) -> str:
    """Return what /proc says of a process; empty when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if "\nState:\tZ" in status else status


def test_a_stopped_rank_is_named_and_a_killed_one_ends_the_run_at_once(packed: Path, tmp_path: Path) -> None:
    stall_s, run = 2.0, tmp_path / "run"
    changes = ("train.epochs=1000", "train.score_every=5000", f"train.stall_s={stall_s}")
    config = tiny_config(tmp_path, packed, *changes)
    command = ["train", str(tmp_path / "experiment.toml"), "--out", str(run)]
    launch = [sys.executable, "-m", "captionscale", "launch", "--processes", "2", "--", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(launch, env=environment, stderr=subprocess.PIPE, text=True) as process:

        def stalls() -> list[dict[str, Any]]:
            """Return those of which a rank without heartbeats is the cause."""
            lines = (run / STALLS_FILE).read_text().splitlines() if (run / STALLS_FILE).exists() else []
            return [each for each in map(json.loads, lines) if any(it["silent"] for it in each["stalled"])]

        def wait_for(condition: Callable[[], object]) -> None:
            deadline = time.monotonic() + 600
            while not condition():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)

        wait_for(lambda: (run / "log.jsonl").exists() and logged_losses(run))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        first, second = sorted(map(int, children))
        os.kill(second, signal.SIGSTOP)
        wait_for(stalls)
        [record] = stalls()
        os.kill(first, signal.SIGKILL)
        # A stopped process does not handle SIGTERM, for which torch waits half a minute.
        while status := status_of(second):
            assert re.findall(r"^(?:Sig|Shd)Pnd:\s+0*4...$", status, re.MULTILINE) == []
            time.sleep(0.01)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 0 on" in stderr
    assert "was killed by SIGKILL" in stderr
    (stalled,) = record["stalled"]
    assert (stalled["rank"], stalled["pid"]) == (1, second)
    assert record["waiting"] == [0]
    split = Split(packed, "train")
    work = make_sampler(split, config).micro_batches(stalled["step"] - 1, 1, 2)
    rows = np.unique(np.concatenate([split.index["shard"][items] for _, items in work]))
    assert stalled["shards"] == [split.info.shards[row].name for row in rows]
    # The innermost frames: which, depends on where it was stopped.
    assert all(re.match(r".+:\d+ in \S+: ", line) for line in stalled["stack"])
    assert stalled["stack"]
    assert f"rank 1 (process {second}" in stderr
