"""Parts of the encoder that begin to learn at a step: one result, wherever a run was broken off."""

import shutil
from pathlib import Path

import pytest
import torch
from experiment import join_all, load_weights, logged_losses, max_abs_difference, start_training, tiny_config
from safetensors.torch import load_file

from captionscale.config import Model, Train
from captionscale.model.captioner import Captioner
from captionscale.train.loop import train
from captionscale.train.optimizer import make_optimizer, unfreeze

TOLERANCE = 1e-5
CHANGES = (
    'model.encoder.trainable=["second", "first"]',
    "train.unfreeze_at=[2, 3]",
    "train.encoder_lr=[1e-3, 5e-4]",
    "train.clip_norm=0.3",
    "train.steps=5",
    "train.save_every=1",
    "train.score_every=5",
    "train.keep_checkpoints=9",
)
PARTS = {"second.0": 2, "first.0": 3}


@pytest.fixture(scope="module")
def alone(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing broke off."""
    folder = tmp_path_factory.mktemp("alone")
    train(tiny_config(folder, packed, *CHANGES), folder / "run")
    return folder / "run"


def memory(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors")


def test_a_stage_is_frozen_and_has_no_optimizer_state_until_its_step(alone: Path) -> None:
    for part, begins in PARTS.items():
        name = f"{part}.weight"
        for step in range(2, 6):
            before, after = (
                load_weights(alone, each)[f"encoder.backbone.{name}"] for each in (step - 1, step)
            )
            found = memory(alone, step)
            assert torch.equal(before, after) == (step <= begins)
            assert (f"encoder.backbone.{name}/step" in found) == (step > begins)
            if step > begins:
                assert found[f"encoder.backbone.{name}/step"] == step - begins
            assert found["decoder.embedding.weight/step"] == step


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_killed_near_an_unfreezing_step_resumes_with_the_same_result(
    alone: Path, packed: Path, tmp_path: Path, step: int
) -> None:
    run = shutil.copytree(alone, tmp_path / "run")
    for later in range(step + 1, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")
    train(tiny_config(tmp_path, packed, *CHANGES), run)
    assert max_abs_difference(load_weights(run), load_weights(alone)) == 0
    assert max_abs_difference(memory(run, 5), memory(alone, 5)) == 0
    assert logged_losses(run) == logged_losses(alone)


@pytest.mark.parametrize("zero", [None, 2])
def test_two_ranks_have_the_result_of_one_over_unfreezing_steps(
    alone: Path, packed: Path, tmp_path: Path, zero: int | None
) -> None:
    profile = {} if zero is None else {"ACCELERATE_USE_DEEPSPEED": "true"}
    profile |= {} if zero is None else {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero)}
    join_all(start_training(2, tiny_config(tmp_path, packed, *CHANGES), tmp_path / "run", **profile))
    assert max_abs_difference(load_weights(tmp_path / "run"), load_weights(alone)) < TOLERANCE
    assert max_abs_difference(memory(tmp_path / "run", 5), memory(alone, 5)) < TOLERANCE
    expected = [(step, pytest.approx(loss, abs=TOLERANCE)) for step, loss in logged_losses(alone)]
    assert logged_losses(tmp_path / "run") == expected


def captioner(*trainable: str) -> Captioner:
    encoder = {"name": "resnet18", "weights": "none", "trainable": trainable}
    return Captioner(Model.model_validate({"encoder": encoder}), 20)


def test_each_stage_has_its_learning_rate_and_vectors_have_no_weight_decay() -> None:
    model = captioner("layer4", "layer3")
    settings = Train(lr=1.0, encoder_lr=(0.25, 0.5), weight_decay=0.1)
    rates = {}
    for group in make_optimizer(model, settings).param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["peak_lr"]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)
    for name, parameter in model.named_parameters():
        expected = {"layer4": 0.25, "layer3": 0.5}.get(name.split(".")[2], 1.0)
        norm_or_lower = name.startswith("encoder") and not parameter.requires_grad
        assert rates.get(parameter) == (None if norm_or_lower else expected)


def test_one_value_is_for_all_stages_and_frozen_parameters_do_not_change() -> None:
    model, settings = captioner("layer4", "layer3"), Train(unfreeze_at=7, encoder_lr=0.5)
    assert unfreeze(model, settings, 0)
    decoder = set(model.decoder.parameters())
    assert {
        each for group in make_optimizer(model, settings).param_groups for each in group["params"]
    } == decoder
    assert not unfreeze(model, settings, 6)
    assert unfreeze(model, settings, 7)
    assert {group["peak_lr"] for group in make_optimizer(model, settings).param_groups} == {0.5, settings.lr}
    assert not unfreeze(model, settings, 8)


@pytest.mark.parametrize("trainable", ["all", "none"])
def test_a_single_value_in_brackets_is_for_all_stages(trainable: str) -> None:
    encoder = {"name": "resnet18", "trainable": trainable}
    model = Captioner(Model.model_validate({"encoder": encoder}), 20)
    settings = Train(unfreeze_at=(3,), encoder_lr=(0.5,))
    assert unfreeze(model, settings, 2) == (trainable == "all")
    assert unfreeze(model, settings, 3) == (trainable == "all")
    assert model.encoder.is_trainable == (trainable == "all")
    make_optimizer(model, settings)
