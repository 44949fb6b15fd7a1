import pytest
import torch
from experiment import load_weights, max_abs_difference, tiny_config
from torch import nn

from captionscale.train.checkpoint import open_checkpoint
from captionscale.train.ema import ModelEMA
from captionscale.train.loop import train
from captionscale.train.run_folder import checkpoint_steps


def test_the_average_equals_the_recurrence() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 4.0)
    average = ModelEMA(model, 0.2)
    expected, values = 4.0, [1.0, -2.0, 8.0, 0.0]
    for step, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        average.update(step)
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.state_dict()["weight"].item() == pytest.approx(expected)
    with average.average_parameters():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 0
    assert average.state_dict()["weight"].item() == pytest.approx(expected)


def test_a_run_saves_resumes_and_captions_with_the_average(packed, tmp_path, monkeypatch) -> None:
    settings = tiny_config(tmp_path, packed, "train.ema_decay=0.9", "train.save_every=3", "train.lr=5e-3")
    half = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": 3})})
    # The schedule must not depend on the number of steps.
    monkeypatch.setattr("captionscale.train.step.lr_factor", lambda step, _, __: 1 / (1 + step))
    train(settings, tmp_path / "uninterrupted")
    train(half, tmp_path / "resumed")
    train(settings, tmp_path / "resumed")
    for run in ("uninterrupted", "resumed"):
        assert checkpoint_steps(tmp_path / run)[-1] == 6
    assert (
        max_abs_difference(load_weights(tmp_path / "uninterrupted"), load_weights(tmp_path / "resumed")) == 0
    )
    both = [open_checkpoint(tmp_path / run, "last").ema_weights() for run in ("uninterrupted", "resumed")]
    assert max_abs_difference(*both) == 0

    saved = open_checkpoint(tmp_path / "uninterrupted", "last")
    average = saved.ema_weights()
    assert average.keys() <= saved.weights().keys()
    assert max_abs_difference(average, {name: saved.weights()[name] for name in average}) > 1e-4
    for name, tensor in saved.captioner().state_dict().items():
        assert torch.equal(tensor, (saved.weights() | average)[name])
