"""Any number of processes, one result: real processes over gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiment import greatest_difference, losses, tiny, weights

from captionscale.train import checkpoint
from captionscale.train.loop import train

TOLERANCE = 1e-5
PROGRAM = [sys.executable, "-m", "captionscale"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process: dropout, augmentation, four micro-batches in each of six steps."""
    folder = tmp_path_factory.mktemp("alone")
    train(tiny(folder, packed), folder / "run")
    return folder / "run"


def _launch(folder: Path, processes: int) -> Path:
    """Train what stands in a folder on several processes."""
    launch = ["launch", "--profile", "cpu", "--processes", str(processes), "--"]
    verb = ["train", str(folder / "experiment.toml"), "--out", str(folder / "run")]
    subprocess.run([*PROGRAM, *launch, *verb], check=True)
    return folder / "run"


def test_two_processes_end_with_the_weights_and_losses_of_one(
    alone: Path, packed: Path, tmp_path: Path
) -> None:
    tiny(tmp_path, packed)
    together = _launch(tmp_path, 2)
    assert greatest_difference(weights(together), weights(alone)) < TOLERANCE
    for (step, loss), (same_step, same_loss) in zip(losses(together), losses(alone), strict=True):
        assert step == same_step
        assert loss == pytest.approx(same_loss, abs=TOLERANCE)


# Three processes share four micro-batches, so one of them does two.
def test_a_run_killed_on_one_process_goes_on_with_three_and_ends_as_if_nothing_had_been(
    alone: Path, packed: Path, tmp_path: Path
) -> None:
    tiny(tmp_path, packed, "train.save_every=1")
    run = tmp_path / "run"
    command = [*PROGRAM, "train", str(tmp_path / "experiment.toml"), "--out", str(run)]
    process = subprocess.Popen(command, env=ONE_THREAD)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints").exists() or not checkpoint.steps(run):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.steps(run)[-1] < 6, "it ended before it could be killed"
    _launch(tmp_path, 3)
    assert greatest_difference(weights(run), weights(alone)) < TOLERANCE
    assert losses(run) == [(step, pytest.approx(loss, abs=TOLERANCE)) for step, loss in losses(alone)]
