"""Trackers that never answer: a run ends in time, and nothing of them is left."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from experiment import logged_losses, tiny_config

from captionscale import toml
from captionscale.config import Config
from captionscale.errors import PreemptedError
from captionscale.train import loop, preemption, schedule, tracking
from captionscale.train.log_writer import LogWriter
from captionscale.train.tracking import Trackers

FAKE = """
import atexit, os, pathlib, signal, subprocess, sys, threading, time, types
FOLDER = pathlib.Path(__file__).parent
MISCHIEF = {mischief!r}
# As wandb does for its service.
service = subprocess.Popen(["sleep", "1000"], start_new_session=True)
def wait_for_ever():
    (FOLDER / "reached").touch()
    while True:
        time.sleep(1000)
def enter(name):
    with (FOLDER / "calls").open("a") as file:
        print(name, file=file)
    if MISCHIEF == name:
        wait_for_ever()
if MISCHIEF == "thread":
    threading.Thread(target=wait_for_ever).start()
if MISCHIEF == "exit":
    atexit.register(wait_for_ever)
if MISCHIEF == "crash":
    os._exit(7)
def set_experiment(name):
    pass
def start_run(run_id, run_name):
    enter("start")
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id="7", artifact_uri="there"))
def log_params(settings):
    pass
def log_metrics(points, step):
    enter("log")
def end_run():
    enter("finish")
    if MISCHIEF == "none":
        service.kill()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a package `mlflow` first that never returns from one of its calls."""

    def put(mischief: str) -> Path:
        folder = tmp_path / "packages"
        (folder / "mlflow" / "utils").mkdir(parents=True)
        package = folder / "mlflow"
        (package / "__init__.py").write_text(FAKE.format(mischief=mischief), encoding="utf-8")
        (package / "utils" / "__init__.py").touch()
        (package / "utils" / "validation.py").write_text(
            "MAX_PARAMS_TAGS_PER_BATCH = 100\n", encoding="utf-8"
        )
        monkeypatch.setenv("PYTHONPATH", str(folder))
        return package

    return put


def settings() -> Config:
    return toml.load("quickstart", ['train.trackers=["mlflow"]'])


def family() -> list[psutil.Process]:
    """Return the processes of trackers, and theirs."""
    return [each for each in psutil.Process().children(recursive=True) if is_alive(each)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("mischief", ["start", "log", "finish", "thread", "exit"])
def test_a_tracker_that_hangs_is_ended_with_all_that_it_started(
    mischief: str, fake: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    package = fake(mischief)
    before = set(family())
    log = LogWriter(tmp_path, 0, 0)
    trackers = Trackers(tmp_path, settings())
    log.write(1, loss=2.0)
    if mischief in ("start", "log", "thread"):
        wait_for((package / "reached").exists)
        started = set(family()) - before
        # Its own process and the fake's service.
        assert len(started) >= 2
    # Time to come as far as it can; it never ends by itself.
    monkeypatch.setattr(tracking, "_CLOSE_S", 3.0)
    trackers.close()
    wait_for(lambda: set(family()) <= before)
    assert "warning: trackers: have not taken all within 3 s" in capsys.readouterr().err


def test_one_that_ends_by_itself_has_all_and_is_waited_for(
    fake: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    package = fake("none")
    monkeypatch.setattr(tracking, "_CLOSE_S", 300.0)
    log = LogWriter(tmp_path, 0, 0)
    trackers = Trackers(tmp_path, settings())
    for step in (1, 2, 1):
        log.write(step, loss=2.0, stop_reason="SIGTERM")
    trackers.close()
    assert (package / "calls").read_text().split() == ["start", "log", "log", "log", "finish"]
    assert capsys.readouterr().err == "mlflow: there\n"


def test_one_that_dies_is_told_at_once_and_training_goes_on(
    fake: Callable[[str], Path], tmp_path: Path, capsys
) -> None:
    fake("crash")
    LogWriter(tmp_path, 0, 0).close()
    trackers = Trackers(tmp_path, settings())
    said = ""
    deadline = time.monotonic() + 600
    while "their process ended with exit code 7; " not in said:
        assert time.monotonic() < deadline
        said += capsys.readouterr().err
        time.sleep(0.01)
    trackers.close()
    assert capsys.readouterr().err == ""


def test_a_run_that_is_asked_to_leave_saves_first_and_leaves_a_tracker_that_hangs_behind(
    packed: Path, fake: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = fake("log")
    monkeypatch.setattr(tracking, "_CLOSE_S", 0.1)
    config = tiny_config(
        tmp_path, packed, 'train.trackers=["mlflow"]', "train.epochs=10000", "train.score_every=100000"
    )
    real = schedule.lr_factor

    def rate(step: int, steps: int, warmup_ratio: float) -> float:
        if (package / "reached").exists() and not preemption.requested():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, steps, warmup_ratio)

    monkeypatch.setattr("captionscale.train.step.lr_factor", rate)
    before = set(family())
    with pytest.raises(PreemptedError, match=r"SIGTERM: step .* was saved"), preemption.handle_signals():
        loop.train(config, tmp_path / "run")
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["stop_reason"] == "SIGTERM"
    assert logged_losses(tmp_path / "run")
    wait_for(lambda: set(family()) <= before)
