"""Any number of processes, one result: real processes over gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captionscale.train import checkpoint
from experiment import greatest_difference, losses, tiny, weights

TOLERANCE = 1e-5


def _command(folder: Path, processes: int) -> list[str]:
    verb = ["train", str(folder / "experiment.toml"), "--out", str(folder / f"run-{processes}")]
    launch = ["launch", "--profile", "cpu", "--processes", str(processes), "--"]
    return [sys.executable, "-m", "captionscale", *(launch if processes > 1 else []), *verb]


def _train(folder: Path, processes: int) -> Path:
    subprocess.run(_command(folder, processes), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder / f"run-{processes}"


@pytest.fixture(scope="module")
def alone(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process: dropout, augmentation, four micro-batches in each of six steps."""
    folder = tmp_path_factory.mktemp("elastic")
    tiny(folder, packed, "train.save_every=1", "train.keep=9")
    return _train(folder, 1)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_end_with_the_weights_and_losses_of_one(alone: Path, processes: int) -> None:
    together = _train(alone.parent, processes)
    assert greatest_difference(weights(together), weights(alone)) < TOLERANCE
    for (step, loss), (same_step, same_loss) in zip(losses(together), losses(alone), strict=True):
        assert step == same_step
        assert loss == pytest.approx(same_loss, abs=TOLERANCE)


def test_a_run_killed_on_one_process_goes_on_with_two(alone: Path, packed: Path, tmp_path: Path) -> None:
    tiny(tmp_path, packed, "train.save_every=1", "train.keep=9")
    run = tmp_path / "run-2"
    killed = [*_command(tmp_path, 1)[:-1], str(run)]
    process = subprocess.Popen(killed, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (run / "checkpoints").exists() or not checkpoint.steps(run):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.steps(run)[-1] < checkpoint.steps(alone)[-1], "it ended before it could be killed"
    _train(tmp_path, 2)
    assert greatest_difference(weights(run), weights(alone)) < TOLERANCE
    assert [step for step, _ in losses(run)] == [step for step, _ in losses(alone)]


def test_more_processes_than_micro_batches_are_refused_by_name(alone: Path) -> None:
    done = subprocess.run(_command(alone.parent, 5), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "train.global_batch = 16 holds 4 micro-batches" in done.stderr
    assert "Traceback" not in done.stderr
