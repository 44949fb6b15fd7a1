import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from experiment import load_weights, logged_losses, max_abs_difference, tiny_config

from captionscale.errors import PreemptedError, UserError
from captionscale.tools.ensemble import open_ensemble
from captionscale.tools.scoring import caption_run
from captionscale.train import generation, preemption, schedule
from captionscale.train.checkpoint import find_latest
from captionscale.train.loop import train
from captionscale.train.run_folder import checkpoint_steps

pytestmark = pytest.mark.long

# Four batches of validation; twelve steps, scored after each sixth.
CHANGES = ("train.epochs=4", "train.score_every=6", "train.save_every=100", "search.batch_size=2")


@pytest.fixture(scope="module")
def uninterrupted(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(tiny_config(folder, packed, *CHANGES), folder / "run")
    return folder / "run"


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def scores(run: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["scores"]) for line in lines(run) if "scores" in line]


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return sorted(int(child) for task in tasks for child in task.read_text().split())


def signal_in_the_first_batch(monkeypatch: pytest.MonkeyPatch, *signals: signal.Signals) -> None:
    """Have this process get real signals while it captions its next batch."""
    real, left = generation.generate_tokens, list(signals)

    def captions(*arguments: Any) -> Any:
        while left:
            os.kill(os.getpid(), left.pop())
        return real(*arguments)

    monkeypatch.setattr(generation, "generate_tokens", captions)


def test_a_signal_to_one_of_two_ranks_saves_both_and_the_run_resumes_with_the_same_result(
    uninterrupted: Path, packed: Path, tmp_path: Path
) -> None:
    tiny_config(tmp_path, packed, *CHANGES, "train.epochs=400")
    settings, run = tiny_config(tmp_path, packed, *CHANGES), tmp_path / "run"
    command = ["train", str(tmp_path / "experiment.toml"), "--out", str(run)]
    launch = [sys.executable, "-m", "captionscale", "launch", "--processes", "2", "--", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(launch, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 600
        while not (run / "log.jsonl").exists() or not logged_losses(run):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(children(process.pid)[1], signal.SIGUSR1)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == PreemptedError.EXIT_CODE
    (step,) = checkpoint_steps(run)
    assert step < 12, "it ended before the signal"
    last = lines(run)[-1]
    assert (last["step"], last["stop_reason"]) == (step, "SIGUSR1")
    assert last["stop_save_s"] > 0
    assert f"step {step} was saved within" in stderr
    assert "Traceback" not in stderr
    train(settings, run)
    assert max_abs_difference(load_weights(run), load_weights(uninterrupted)) < 1e-5
    assert logged_losses(run) == [
        (step, pytest.approx(loss, abs=1e-5)) for step, loss in logged_losses(uninterrupted)
    ]


def test_an_interrupted_validation_is_run_by_the_resumed_run(
    uninterrupted: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = tiny_config(tmp_path, packed, *CHANGES), tmp_path / "run"
    for _ in range(2):
        # The second time, the resumed run is interrupted at once.
        signal_in_the_first_batch(monkeypatch, signal.SIGTERM)
        with pytest.raises(PreemptedError, match="SIGTERM: step 6 was saved"), preemption.handle_signals():
            train(settings, run)
        assert checkpoint_steps(run) == [6]
        assert scores(run) == []
    train(settings, run)
    assert logged_losses(run) == logged_losses(uninterrupted)
    assert scores(run) == scores(uninterrupted)
    assert max_abs_difference(load_weights(run), load_weights(uninterrupted)) == 0
    resumed, expected = find_latest(run, pytest.fail), find_latest(uninterrupted, pytest.fail)
    assert resumed is not None
    assert expected is not None
    assert resumed.train_state == expected.train_state


def test_pending_scores_are_computed_by_the_resumed_run(
    uninterrupted: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = tiny_config(tmp_path, packed, *CHANGES), tmp_path / "run"
    real, calls = generation.generate_tokens, itertools.count(1)

    def captions(*arguments: Any) -> Any:
        # In the last batch of the last step's validation.
        if next(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            for child in children(os.getpid()):
                if "captionscale.score.worker" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(child, signal.SIGSTOP)
        return real(*arguments)

    monkeypatch.setattr(generation, "generate_tokens", captions)
    with pytest.raises(PreemptedError, match="SIGTERM: step 12 was saved"), preemption.handle_signals():
        train(settings, run)
    saved = find_latest(run, pytest.fail)
    assert saved is not None
    assert (saved.train_state.validated_step, saved.train_state.scored_step) == (12, 6)
    monkeypatch.setattr(generation, "generate_tokens", None)
    assert train(settings, run) == train(settings, uninterrupted)
    assert scores(run) == scores(uninterrupted)


def test_a_missing_validation_is_run_by_the_resumed_run(
    uninterrupted: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = tiny_config(tmp_path, packed, *CHANGES), tmp_path / "run"
    real = schedule.lr_factor

    def rate(step: int, steps: int, warmup_ratio: float) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(step, steps, warmup_ratio)

    # A signal in the fifth step is summed over the ranks in the sixth, which is scored.
    monkeypatch.setattr("captionscale.train.step.lr_factor", rate)
    with pytest.raises(PreemptedError, match="SIGUSR1: step 6 was saved"), preemption.handle_signals():
        train(settings, run)
    assert not (run / "validation").exists()
    train(settings, run)
    assert scores(run) == scores(uninterrupted)
    assert max_abs_difference(load_weights(run), load_weights(uninterrupted)) == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of a job that ends at 1,000, which passes when a test says so."""
    clock = SimpleNamespace(now=0.0)
    times = SimpleNamespace(time=lambda: clock.now, monotonic=time.monotonic)
    monkeypatch.setattr(preemption, "time", times)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    return clock


def test_the_end_of_the_job_s_time_is_a_signal(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    settings = tiny_config(tmp_path, packed, *CHANGES)
    real = schedule.lr_factor

    def rate(step: int, steps: int, warmup_ratio: float) -> float:
        clock.now = (1000 - settings.train.grace_s) * (step >= 2)
        return real(step, steps, warmup_ratio)

    monkeypatch.setattr("captionscale.train.step.lr_factor", rate)
    with (
        pytest.raises(PreemptedError, match="end of the job's time: step 4 was saved"),
        preemption.handle_signals(settings.train.grace_s),
    ):
        train(settings, tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [4]


@pytest.mark.parametrize("end", ["0", "", "UNLIMITED"])
def test_a_job_without_a_limit_has_no_end(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    with preemption.handle_signals(1e9):
        assert not preemption.requested()


def test_a_job_too_short_for_any_progress_is_not_requeued(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    settings, run = tiny_config(tmp_path, packed, *CHANGES), tmp_path / "run"
    signal_in_the_first_batch(monkeypatch, signal.SIGTERM)
    with pytest.raises(PreemptedError), preemption.handle_signals():
        train(settings, run)
    clock.now = 900
    with (
        pytest.raises(UserError, match=r"s left in this job.*ask for more --time"),
        preemption.handle_signals(120.0),
    ):
        pass
    # Time for Python to start, but not for the missing validation.
    with preemption.handle_signals(98.0):
        clock.now = 902
        with pytest.raises(UserError, match="the job's time ended before step 7"):
            train(settings, run)
    assert checkpoint_steps(run) == [6]


def test_a_second_ctrl_c_interrupts_and_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.handle_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested()
        assert preemption.last_request()[1] == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    assert not preemption.requested()
    with preemption.handle_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("left_s", "reason"), [(170, preemption.TIME_LIMIT), (600, "SIGUSR1")])
def test_usr1_shortly_before_the_end_of_the_job_means_its_end(
    left_s: int, reason: str, clock: SimpleNamespace
) -> None:
    # SLURM announces the end with it: a job too short for any progress must not be requeued forever.
    clock.now = 1000 - left_s
    with preemption.handle_signals(120.0):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.last_request()[1] == reason


def test_generation_leaves_no_process_and_no_file(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "captions.json"
    members = open_ensemble(uninterrupted, (), checkpoint="last", overrides=())
    signal_in_the_first_batch(monkeypatch, signal.SIGUSR1)
    with pytest.raises(PreemptedError, match="before split 'test' was captioned"):
        caption_run(members, "test", shards=None, out=out)
    assert not out.exists()
    # An unwritable path is an error before generation; finished generation is in the history.
    with pytest.raises(UserError, match="is a folder, expected a file"):
        caption_run(members, "test", shards=None, out=tmp_path)
    assert caption_run(members, "test", shards=None, out=out) == 8
    line = json.loads((uninterrupted / "scores" / "history.jsonl").read_text().splitlines()[-1])
    assert (line["split"], line["captions"]) == ("test", str(out.resolve()))
    assert line["search"]["beam"] >= 1
    assert "scores" not in line
