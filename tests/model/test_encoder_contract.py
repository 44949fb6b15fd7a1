"""Laws that every encoder keeps: a new line in the registry is tested here without another line of test."""

import pytest
import torch
from torch import Tensor

from captionscale.config_model import ENCODERS, EncoderConfig, Model
from captionscale.errors import UserError
from captionscale.model.encoders.encoder import Encoder, encoder_class


def build(name: str, **options: object) -> Encoder:
    torch.manual_seed(0)
    config = Model.model_validate({"encoder": {"name": name, "weights": "none", **options}}).encoder
    encoder: Encoder = encoder_class(name)(config)
    return encoder


def images(encoder: Encoder, count: int = 2) -> Tensor:
    side, generator = encoder.image_size or 64, torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


# The first name of each class; MobileNetV2 differs in structure from a ResNet.
SMALLEST = {place: name for name, place in reversed(ENCODERS.items())}


@pytest.fixture(params=sorted({*SMALLEST.values(), "mobilenet_v2"}))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_regions_are_prefix_tokens_and_the_grid(name) -> None:
    encoder = build(name).eval()
    rows, columns = encoder.grid(*images(encoder).shape[2:])
    features = encoder(images(encoder))
    assert features.shape == (2, encoder.num_prefix_tokens + rows * columns, encoder.feature_size)
    assert issubclass(encoder.Config, EncoderConfig)
    torch.testing.assert_close(encoder(images(encoder)[1:]), features[1:], atol=1e-4, rtol=1e-4)


def test_attention_maps_are_the_grid_without_prefix_tokens(name) -> None:
    encoder = build(name)
    height, width = images(encoder).shape[2:]
    rows, columns = encoder.grid(height, width)
    attention = torch.arange(2.0 * (encoder.num_prefix_tokens + rows * columns)).view(2, -1)
    maps = encoder.attention_maps(attention, height, width)
    assert maps.shape == (2, rows, columns)
    assert torch.equal(maps.flatten(1), attention[:, encoder.num_prefix_tokens :])


def test_an_interpolation_that_the_transforms_do_not_have_is_refused(name) -> None:
    config = build(name).config
    kind = encoder_class(name)
    nearest, cubic = (
        type(kind.__name__, (kind,), {"interpolation": each}) for each in ("nearest", "bicubic")
    )
    with pytest.raises(UserError, match="its interpolation is 'nearest', expected 'bilinear' or 'bicubic'"):
        nearest(config)
    torch.manual_seed(0)
    assert cubic(config).identity != build(name).identity


def test_images_are_normalized_by_the_declared_mean_and_std(name) -> None:
    encoder = build(name).eval()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (encoder.mean, encoder.std))
    expected = encoder.forward_features((images(encoder).float() / 255 - mean) / std)
    torch.testing.assert_close(encoder(images(encoder)), expected, atol=1e-4, rtol=1e-4)


def test_a_frozen_encoder_has_no_gradient_and_does_not_change(name) -> None:
    encoder = build(name)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    assert not encoder.is_trainable
    assert not encoder.train()(images(encoder)).requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


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


def test_identity_changes_with_weights_and_nothing_else(name) -> None:
    encoder = build(name)
    assert encoder.identity == build(name, trainable="all").identity
    with torch.no_grad():
        next(encoder.backbone.parameters()).add_(1)
    assert encoder.identity != build(name).identity


def test_an_image_size_that_is_no_int_is_refused(name) -> None:
    kind = encoder_class(name)
    tall = type("Tall", (kind,), {"image_size": (64, 32)})
    with pytest.raises(UserError, match=r"its image_size is \(64, 32\), expected an int"):
        tall(build(name).config)(torch.zeros(1, 3, 64, 32, dtype=torch.uint8))


def test_weights_that_cannot_be_downloaded_are_an_error_with_the_cure(name) -> None:
    def offline(_: object) -> None:
        raise OSError("no network")

    kind = type("Offline", (encoder_class(name),), {"download_weights": offline})
    config = build(name).config.model_copy(update={"weights": "imagenet"})
    with pytest.raises(UserError, match=r"\(no network\).* set model.encoder.weights"):
        kind(config).load_pretrained()
