"""Laws that every encoder keeps: one line in `ENCODERS` adds one."""

import pytest
import torch
from torch import Tensor

from captionscale.config_model import EncoderConfig, Model
from captionscale.model.encoders.encoder import Encoder, encoder_class

ENCODERS = ["resnet18", "mobilenet_v2"]
"""A name for each pattern of the registry."""


def build(name: str, **options: object) -> Encoder:
    torch.manual_seed(0)
    config = Model.model_validate({"encoder": {"name": name, "weights": "none", **options}}).encoder
    encoder: Encoder = encoder_class(name)(config)
    return encoder


def images(encoder: Encoder, count: int = 2) -> Tensor:
    side, generator = encoder.image_size or 64, torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", ENCODERS)
def test_regions_are_prefix_tokens_and_the_grid(name) -> None:
    encoder = build(name).eval()
    rows, columns = encoder.grid(*images(encoder).shape[2:])
    features = encoder(images(encoder))
    assert features.shape == (2, encoder.num_prefix_tokens + rows * columns, encoder.feature_size)
    assert issubclass(encoder.Config, EncoderConfig)
    torch.testing.assert_close(encoder(images(encoder)[1:]), features[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_images_are_normalized_by_the_declared_mean_and_std(name) -> None:
    encoder = build(name).eval()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (encoder.mean, encoder.std))
    expected = encoder.forward_features((images(encoder).float() / 255 - mean) / std)
    torch.testing.assert_close(encoder(images(encoder)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_frozen_encoder_has_no_gradient_and_does_not_change(name) -> None:
    encoder = build(name)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    assert not encoder.is_trainable
    assert not encoder.train()(images(encoder)).requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("name", ENCODERS)
def test_stages_train_from_their_step_on(name) -> None:
    last = list(dict(build(name).backbone.named_parameters()))[-1].partition(".")[0]
    encoder = build(name, trainable=[last])
    assert encoder.unfreeze(0, [3])
    assert not encoder.is_trainable
    assert encoder.unfreeze(3, [3])
    encoder.train()(images(encoder)).square().sum().backward()
    trained = {id(each) for each in encoder.parameters() if each.grad is not None}
    assert trained == {id(each) for stage in encoder.stages for each in stage}
    assert trained


@pytest.mark.parametrize("name", ENCODERS)
def test_identity_changes_with_weights_and_nothing_else(name) -> None:
    encoder = build(name)
    assert encoder.identity == build(name, trainable="all").identity
    with torch.no_grad():
        next(encoder.backbone.parameters()).add_(1)
    assert encoder.identity != build(name).identity
