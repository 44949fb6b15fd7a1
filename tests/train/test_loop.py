import gzip
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from experiment import load_weights, logged_losses, max_abs_difference, tiny_config

from captionscale.errors import UserError
from captionscale.files import lock
from captionscale.score import worker
from captionscale.train import generation, schedule, validation
from captionscale.train.checkpoint import find_latest
from captionscale.train.loop import train
from captionscale.train.run_folder import checkpoint_steps


@pytest.fixture(scope="module")
def done(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, scored and saved after each third."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("done") / "run")


def test_a_run_logs_every_step_scores_every_epoch_and_keeps_the_best(done: Path) -> None:
    assert [step for step, _ in logged_losses(done)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in sorted((done / "validation").iterdir())] == [
        "step-00000003.json",
        "step-00000006.json",
    ]
    saved = find_latest(done, pytest.fail)
    assert saved is not None
    assert saved.train_state.step == 6
    assert saved.train_state.best_step in checkpoint_steps(done)
    assert list((done / "tensorboard").iterdir())


def test_a_killed_and_resumed_run_has_the_weights_of_an_uninterrupted_one(
    done: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_config(tmp_path, packed, "train.save_every=1")
    killed_at = 4
    real = schedule.lr_factor

    def die(step: int, steps: int, warmup_ratio: float) -> float:
        if step == killed_at:
            raise KeyboardInterrupt
        return real(step, steps, warmup_ratio)

    monkeypatch.setattr("captionscale.train.step.lr_factor", die)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run")[-1] == killed_at
    monkeypatch.setattr("captionscale.train.step.lr_factor", real)
    train(settings, tmp_path / "run")
    assert max_abs_difference(load_weights(tmp_path / "run"), load_weights(done)) == 0
    assert logged_losses(tmp_path / "run") == logged_losses(done)


def test_a_resumed_run_stops_early_at_the_same_step(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("train.lr=1e-12", "train.encoder_lr=1e-12", "train.epochs=6", "train.patience=1")
    settings, run = tiny_config(tmp_path, packed, *changes), tmp_path / "run"
    real = schedule.lr_factor

    def die(step: int, steps: int, warmup_ratio: float) -> float:
        if step == 7:
            raise KeyboardInterrupt
        return real(step, steps, warmup_ratio)

    monkeypatch.setattr("captionscale.train.step.lr_factor", die)
    with pytest.raises(KeyboardInterrupt):
        train(settings, run)
    assert checkpoint_steps(run)[-1] == 6
    monkeypatch.setattr("captionscale.train.step.lr_factor", real)
    # The scores of step 6, no better than those of step 3, count at step 9.
    assert train(settings, run).step == 9


def test_failed_scoring_is_a_warning_unless_it_is_the_first(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings, run = tiny_config(tmp_path, packed), tmp_path / "run"
    real = generation.generate_tokens

    def captions(*arguments: Any) -> Any:
        for process in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
            for child in process.read_text().split():
                if "captionscale.score.worker" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(int(child), signal.SIGKILL)
        return real(*arguments)

    monkeypatch.setattr(generation, "generate_tokens", captions)
    monkeypatch.setattr(worker, "_TRIES", 1)
    train_state = train(settings, run)
    assert (train_state.step, train_state.validated_step, train_state.scored_step, train_state.best_step) == (
        6,
        6,
        6,
        3,
    )
    assert "warning: step 6 has no scores: scoring: its process ended" in capfd.readouterr().err
    monkeypatch.setattr(validation, "_METRICS", ("BLEU-5",))
    with pytest.raises(UserError, match="unknown metric 'BLEU-5'"):
        train(tiny_config(tmp_path, packed), tmp_path / "other")


def test_a_finished_run_has_nothing_left_to_do(done: Path, packed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(done, tmp_path / "run")
    before = (run / "log.jsonl").read_text()
    assert train(tiny_config(tmp_path, packed), run).step == 6
    assert (run / "log.jsonl").read_text() == before


def test_training_stops_when_scores_stop_improving(packed: Path, tmp_path: Path) -> None:
    # A learning rate of nearly zero: every validation has the captions of the first.
    changes = ("train.lr=1e-12", "train.encoder_lr=1e-12", "train.score_every=1", "train.patience=2")
    settings, run = tiny_config(tmp_path, packed, *changes), tmp_path / "run"
    for _ in range(2):
        train_state = train(settings, run)
        # The third scores count at the next validation, which is then skipped.
        assert (
            train_state.step,
            train_state.validated_step,
            train_state.scored_step,
            train_state.best_step,
        ) == (4, 3, 3, 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("data.min_count=30", "vocabulary"),
        ("data.min_count=30", "data.min_count was 1, now 30"),
        ("train.micro_batch=2", "train.micro_batch was 4, now 2"),
        ("seed=1", "seed was 0, now 1"),
        ("model.decoder.hidden_size=8", "model.decoder.hidden_size"),
    ],
)
def test_a_run_cannot_resume_another_experiment(
    done: Path, packed: Path, tmp_path: Path, change: str, named: str
) -> None:
    with pytest.raises(UserError, match="cannot resume another experiment") as caught:
        train(tiny_config(tmp_path, packed, change), done)
    assert named in str(caught.value)
    assert "take another --out" in str(caught.value)


def test_workers_and_paths_may_change_within_a_run(done: Path, packed: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(packed, tmp_path / "moved")
    run = shutil.copytree(done, tmp_path / "run")
    train(tiny_config(tmp_path, moved, "data.workers=2"), run)


def test_a_run_that_another_process_writes_is_refused(packed: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, over = context.Event(), context.Event()

    def hold() -> None:
        with lock(tmp_path / "run", "captionscale train"):
            held.set()
            over.wait(30)

    holder = context.Process(target=hold)
    holder.start()
    try:
        assert held.wait(30)
        with pytest.raises(UserError, match=rf"in use by captionscale train, process {holder.pid}"):
            train(tiny_config(tmp_path, packed), tmp_path / "run")
    finally:
        over.set()
        holder.join()


def test_an_unknown_split_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'dev'; known: test, train, val"):
        train(tiny_config(tmp_path, packed, "data.val_split=dev"), tmp_path / "run")


def test_fp16_without_a_gpu_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.precision = fp16 needs a GPU"):
        train(tiny_config(tmp_path, packed, "train.precision=fp16"), tmp_path / "run")


def test_a_diverged_run_ends_before_it_is_saved(packed: Path, tmp_path: Path) -> None:
    changes = ("train.lr=1e30", "train.encoder_lr=1e30", "train.log_every=1000", "train.warmup_ratio=0")
    with pytest.raises(UserError, match=r"lower train\.lr"):
        train(tiny_config(tmp_path, packed, *changes), tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == []


def test_a_run_that_cannot_start_leaves_nothing_behind(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        train(tiny_config(tmp_path, packed, "model.encoder.weights=none.pth"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resume_with_another_score_metric_is_refused(done: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.score_metric was 'CIDEr-D', now 'BLEU-4'"):
        train(tiny_config(tmp_path, packed, "train.score_metric=BLEU-4"), done)


def test_a_run_learns_in_bf16(packed: Path, tmp_path: Path) -> None:
    changes = ("train.precision=bf16", "train.epochs=4", "train.lr=1e-2", "train.label_smoothing=0")
    train(tiny_config(tmp_path, packed, *changes), tmp_path / "run")
    found = [loss for _, loss in logged_losses(tmp_path / "run")]
    assert found[-1] < 0.9 * found[0]


def test_scheduled_sampling_starts_after_the_first_step_and_uneven_attention_has_a_penalty(
    packed: Path, tmp_path: Path
) -> None:
    logs = {}
    changes = {
        "plain": "seed=0",
        "own": "train.scheduled_sampling=1.0",
        "even": "train.doubly_stochastic_weight=0.5",
    }
    for name, change in changes.items():
        train(tiny_config(tmp_path, packed, "train.steps=2", "train.score_every=2", change), tmp_path / name)
        logs[name] = [loss for _, loss in logged_losses(tmp_path / name)]
    assert logs["own"][0] == logs["plain"][0]
    assert abs(logs["own"][1] - logs["plain"][1]) > 1e-4
    # No caption has attended to each region exactly once.
    assert all(even > plain + 1e-3 for even, plain in zip(logs["even"], logs["plain"], strict=True))


def test_a_profile_prints_the_most_expensive_operations_and_changes_no_loss(
    done: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(tmp_path, packed), tmp_path / "run", profile_steps=2)
    # The run has six steps, of which five warm up.
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    with gzip.open(trace, "rt") as file:
        assert any(event["name"] == "aten::convolution" for event in json.load(file)["traceEvents"])
    stderr = capsys.readouterr().err
    assert str(trace) in stderr
    assert sum(line.lstrip().startswith("aten::") for line in stderr.splitlines()) >= 5
    assert logged_losses(tmp_path / "run") == logged_losses(done)
