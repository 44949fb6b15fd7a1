"""Engines: what each does alone, and that a run ends the same under all of them, in real processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experiment import join_all, load_weights, logged_losses, max_abs_difference, start_training, tiny_config
from safetensors.torch import load_file
from torch import nn

from captionscale.distributed.engine import Engine
from captionscale.distributed.ranks import Ranks
from captionscale.train.loop import train
from captionscale.train.run_folder import checkpoint_steps

pytestmark = pytest.mark.long

TOLERANCE = 1e-5
# Gradients of norm 0.7 to 0.8 are clipped at each of the three steps.
CHANGES = ("train.epochs=1", "train.clip_norm=0.3", "train.save_every=1", "train.keep_checkpoints=3")


def test_the_forward_pass_has_the_precision_of_the_run() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 64)
    outputs = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(1)
        layer = nn.Linear(64, 4)
        with Ranks(precision) as ranks:
            outputs[precision] = Engine(ranks, layer, torch.optim.AdamW(layer.parameters()), 1.0)(inputs)
    assert outputs["bf16"].dtype == torch.float32
    assert 1e-4 < (outputs["bf16"] - outputs["fp32"]).abs().max() < 1e-1


def test_the_gradient_is_clipped_to_the_maximum_norm() -> None:
    layer = nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    with Ranks() as ranks:
        engine = Engine(ranks, layer, torch.optim.SGD(layer.parameters(), lr=1.0), 2.0)
        layer.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
        assert engine.step().item() == pytest.approx(5)
    assert (layer.weight - before).norm().item() == pytest.approx(2, rel=1e-4)
    assert layer.weight.grad is None


def test_a_run_whose_steps_fp16_has_all_skipped_resumes_without_optimizer_state() -> None:
    layer = nn.Linear(3, 1)
    with Ranks() as ranks:
        engine = Engine(ranks, layer, torch.optim.AdamW(layer.parameters()), 1.0)
        assert engine.optimizer_state() == {}
        engine.load_optimizer_state({})
        layer(torch.ones(3)).sum().backward()
        engine.step()
        assert engine.optimizer_state().keys() >= {"weight/step", "bias/exp_avg"}


@pytest.fixture(scope="module")
def alone(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process: dropout, augmentation, four micro-batches in each of three steps."""
    folder = tmp_path_factory.mktemp("alone")
    train(tiny_config(folder, packed, *CHANGES), folder / "run")
    return folder / "run"


def _zero(stage: int) -> dict[str, str]:
    """Return what `accelerate launch` sets for a profile of DeepSpeed's."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def _memory(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{checkpoint_steps(run)[-1]:08d}" / "optimizer.safetensors")


def _back_to(step: int, run: Path) -> None:
    for later in checkpoint_steps(run):
        if later > step:
            shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")


def _expect_the_same(run: Path, alone: Path) -> None:
    assert max_abs_difference(load_weights(run), load_weights(alone)) < TOLERANCE
    assert max_abs_difference(_memory(run), _memory(alone)) < TOLERANCE
    assert logged_losses(run) == [
        (step, pytest.approx(loss, abs=TOLERANCE)) for step, loss in logged_losses(alone)
    ]


def test_two_ranks_of_zero_have_the_weights_losses_and_optimizer_state_of_one_process(
    alone: Path, packed: Path, tmp_path: Path
) -> None:
    join_all(start_training(2, tiny_config(tmp_path, packed, *CHANGES), tmp_path / "run", **_zero(1)))
    _expect_the_same(tmp_path / "run", alone)


def test_a_run_resumes_from_zero_2_in_one_process_and_back_with_the_same_result(
    alone: Path, packed: Path, tmp_path: Path
) -> None:
    settings, run = tiny_config(tmp_path, packed, *CHANGES), tmp_path / "run"
    launch = [sys.executable, "-m", "captionscale", "launch", "--profile", "zero2", "--processes", "2", "--"]
    verb = ["train", str(tmp_path / "experiment.toml"), "--out", str(run)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *verb], check=True, capture_output=True, text=True, env=environment)
    assert "deepspeed" not in (done.stdout + done.stderr).lower(), "it is to be quiet"
    _expect_the_same(run, alone)
    _back_to(1, run)
    train(settings, run)
    _expect_the_same(run, alone)
    _back_to(2, run)
    join_all(start_training(2, settings, run, **_zero(2)))
    _expect_the_same(run, alone)


def test_gradients_reduced_in_bf16_are_nearly_those_in_fp32(
    alone: Path, packed: Path, tmp_path: Path
) -> None:
    settings = tiny_config(tmp_path, packed, *CHANGES, "train.compress_gradients=true")
    join_all(start_training(2, settings, tmp_path / "run"))
    assert TOLERANCE < max_abs_difference(load_weights(tmp_path / "run"), load_weights(alone)) < 2e-3
