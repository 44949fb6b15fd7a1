import pytest
import torch
import torchvision
from tiny_encoder import TinyEncoder
from torch import Tensor, nn

from captionscale.config_model import EncoderConfig
from captionscale.config_model import TorchvisionConfig as Settings
from captionscale.errors import UserError
from captionscale.model.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD
from captionscale.model.encoders.torchvision import TorchvisionEncoder as Encoder


def build(name: str = "resnet18", **settings: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(Settings(name=name, **settings))


def random_images(count: int = 2, height: int = 64, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def normalize(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def batch_norms(encoder: Encoder) -> dict[str, nn.BatchNorm2d]:
    return {name: part for name, part in encoder.backbone.named_modules() if isinstance(part, nn.BatchNorm2d)}


def trained_parameters(encoder: Encoder) -> set[str]:
    """Return the names of the parameters that a training step gives a gradient."""
    features = encoder.train()(random_images())
    if features.requires_grad:
        # A plain sum has no gradient through a batch norm that uses the batch's statistics.
        (features * torch.rand(features.shape)).sum().backward()
    return {name for name, parameter in encoder.backbone.named_parameters() if parameter.grad is not None}


def changed_statistics(encoder: Encoder) -> set[str]:
    """Return the names of the batch norms whose statistics a training step moves."""
    before = {name: part.running_mean.clone() for name, part in batch_norms(encoder).items()}
    encoder.train()(random_images())
    return {
        name
        for name, part in batch_norms(encoder).items()
        if not torch.equal(part.running_mean, before[name])
    }


@pytest.mark.parametrize("batch_norm", ["frozen", "trained"])
def test_a_frozen_encoder_has_no_gradient_and_no_drift(batch_norm) -> None:
    encoder = build(batch_norm=batch_norm)
    assert not encoder.is_trainable
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert not encoder.train()(random_images()).requires_grad
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_a_frozen_encoder_returns_the_same_in_training_and_evaluation_mode() -> None:
    encoder = build("mobilenet_v2")
    torch.testing.assert_close(encoder.train()(random_images()), encoder.eval()(random_images()))


def test_with_frozen_batch_norm_only_the_convolutions_of_the_chosen_stage_train() -> None:
    encoder = build(trainable=("layer4",), batch_norm="frozen")
    norms = batch_norms(encoder)
    convolutions = {
        name
        for name, _ in encoder.backbone.named_parameters()
        if name.startswith("layer4.") and name.rpartition(".")[0] not in norms
    }
    assert convolutions
    assert trained_parameters(encoder) == convolutions
    assert changed_statistics(encoder) == set()


def test_with_trained_batch_norm_those_of_the_chosen_stage_train_too() -> None:
    encoder = build(trainable=("layer4",), batch_norm="trained")
    assert trained_parameters(encoder) == {
        name for name, _ in encoder.backbone.named_parameters() if name.startswith("layer4.")
    }
    assert changed_statistics(encoder) == {
        name for name in batch_norms(encoder) if name.startswith("layer4.")
    }


def test_with_all_trained_all_parameters_and_statistics_change() -> None:
    encoder = build(trainable="all", batch_norm="trained")
    assert trained_parameters(encoder) == {name for name, _ in encoder.backbone.named_parameters()}
    assert changed_statistics(encoder) == set(batch_norms(encoder))


def test_a_part_is_named_by_whole_words() -> None:
    encoder = build("mobilenet_v2", trainable=("features.1",))
    learning = {name for name, parameter in encoder.backbone.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(name.startswith("features.1.") for name in learning)


def test_evaluation_after_training_leaves_batch_statistics_unchanged() -> None:
    encoder = build(trainable="all", batch_norm="trained").train().eval()
    before = {name: part.running_mean.clone() for name, part in batch_norms(encoder).items()}
    encoder(random_images())
    assert all(torch.equal(part.running_mean, before[name]) for name, part in batch_norms(encoder).items())


def test_regions_go_row_by_row_from_the_top_left() -> None:
    encoder = build().eval()
    seen: list[Tensor] = []
    encoder.backbone.register_forward_hook(lambda _, __, grid: seen.append(grid))
    regions = encoder(random_images(height=64, width=96))
    assert regions.shape == (2, 6, 512)
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(regions[:, 3 * row + column], seen[0][:, :, row, column])


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_light_in_one_corner_of_the_image_changes_the_regions_of_that_corner_most(corner) -> None:
    encoder = build().eval()
    dark = torch.zeros((1, 3, 192, 256), dtype=torch.uint8)
    lit = dark.clone()
    row, column = 128 * corner[0], 192 * corner[1]
    lit[:, :, row : row + 64, column : column + 64] = 255
    change = (encoder(lit) - encoder(dark)).norm(dim=2)
    place = divmod(int(change.argmax()), 8)
    assert (place[0] >= 3, place[1] >= 4) == (bool(corner[0]), bool(corner[1]))


def test_a_compiled_backbone_has_the_same_gradients_and_evaluation_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The C++ compiler takes seconds for each of few kernels, and more to prepare for many.
    torch.manual_seed(0)
    encoder = TinyEncoder(EncoderConfig(name="tiny_encoder:TinyEncoder", trainable=("second",)))
    encoder.backbone.second[1] = nn.Identity()
    settings = torch._inductor.config
    monkeypatch.setattr(settings, "compile_threads", 1)
    monkeypatch.setattr(settings, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(settings, "layout_optimization", False)
    monkeypatch.setattr(settings.cpp, "vec_isa_ok", False)
    names, images = [*encoder.state_dict()], random_images(2, 32, 32)

    def step() -> list[Tensor]:
        encoder.zero_grad()
        encoder(images).square().mean().backward()
        return [part.grad.clone() for part in encoder.backbone.parameters() if part.grad is not None]

    plain = step()
    assert plain
    encoder.compile_training()
    for mine, other in zip(step(), plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)
    assert [*encoder.state_dict()] == names
    compiled = encoder.backbone._compiled_call_impl
    monkeypatch.setattr(encoder.backbone, "_compiled_call_impl", lambda *_: pytest.fail("compiled"))
    encoder.eval()(random_images(3, 32, 32))
    assert compiled is not None


def test_a_failing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(_: object) -> object:
        raise RuntimeError("no compiler\nmore of it")

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(UserError, match=r"cannot compile here \(no compiler\), expected a C\+\+ compiler"):
        build().compile_training()


@pytest.mark.parametrize(("name", "feature"), [("resnet18", 512), ("mobilenet_v2", 1280)])
def test_an_image_of_224_pixels_has_49_regions(name, feature) -> None:
    encoder = build(name)
    assert encoder.feature_size == feature
    assert encoder(random_images(1, 224, 224)).shape == (1, 49, feature)


def test_the_backbone_is_torchvisions_network_without_its_classifier() -> None:
    encoder = build().eval()
    network = torchvision.models.resnet18(weights=None)
    network.load_state_dict(encoder.backbone.state_dict(), strict=False)
    network.fc = nn.Identity()
    colors = normalize(random_images())
    torch.testing.assert_close(encoder(random_images()).mean(1), network.eval()(colors), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", ["ResNet50_Weights.IMAGENET1K_V1", "MobileNet_V2_Weights.IMAGENET1K_V1"])
def test_colors_are_normalized_as_torchvision_does_for_its_weights(weights) -> None:
    encoder = build()
    encoder.backbone = nn.Identity()
    normalized = torchvision.models.get_weight(weights).transforms(crop_size=64, resize_size=64)
    expected = normalized(random_images()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(random_images()), expected)


@pytest.mark.parametrize(
    ("name", "part", "known"),
    [
        ("resnet18", "leyer4", "layer4"),
        ("resnet18", "layer4.2", "layer4.[01]"),
        ("mobilenet_v2", "feature", "features"),
    ],
)
def test_the_error_about_an_unknown_stage_names_the_nearest_known_one(name, part, known) -> None:
    with pytest.raises(
        UserError,
        match=rf"^model\.encoder\.trainable: {name} has no part '{part}'; did you mean '{known}'\?$",
    ):
        build(name, trainable=(part,))


# ---- a finer grid


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2"])
@pytest.mark.parametrize(("height", "width"), [(96, 160), (100, 70)])
def test_each_second_cell_of_the_finer_grid_is_one_of_the_coarser_at_the_borders_too(
    name, height, width
) -> None:
    coarse, fine = (build(name, output_stride=stride).eval() for stride in (32, 16))
    fine.load_state_dict(coarse.state_dict())
    grids = []
    for encoder in (coarse, fine):
        encoder.backbone.register_forward_hook(lambda _, __, grid: grids.append(grid))
        encoder(random_images(height=height, width=width))
    rows, columns = -(-height // 16), -(-width // 16)
    assert grids[1].shape[2:] == (rows, columns)
    torch.testing.assert_close(grids[1][:, :, ::2, ::2], grids[0], rtol=0, atol=1e-5 * float(grids[0].max()))


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "mobilenet_v2"])
def test_the_finer_grid_has_196_regions_of_an_image_of_224_pixels(name) -> None:
    assert build(name, output_stride=16).eval()(random_images(1, 224, 224)).shape[1] == 196


def test_torchvision_dilates_its_bottleneck_networks_alike() -> None:
    encoder = build("resnet50", output_stride=16).eval()
    network = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
    network.load_state_dict(encoder.backbone.state_dict(), strict=False)
    network.fc = nn.Identity()
    colors = normalize(random_images())
    torch.testing.assert_close(encoder(random_images()).mean(1), network.eval()(colors), atol=1e-4, rtol=1e-4)


# ---- stages


def learning(encoder: Encoder) -> set[str]:
    """Return the stages of which something learns."""
    return {
        name.partition(".")[0]
        for name, parameter in encoder.backbone.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("batch_norm", ["frozen", "trained"])
def test_stages_train_from_their_step_on(batch_norm) -> None:
    encoder = build(trainable=("layer4", "layer2"), batch_norm=batch_norm)
    starts = (3, 5)
    assert encoder.unfreeze(0, starts)
    assert not encoder.is_trainable
    assert trained_parameters(encoder) == changed_statistics(encoder) == set()
    assert not encoder.unfreeze(2, starts)
    for step, parts in ((3, {"layer4"}), (4, {"layer4"}), (5, {"layer4", "layer2"})):
        assert encoder.unfreeze(step, starts) == (step in starts)
        # Without another call of train(), as in a run.
        at_work = {name.partition(".")[0] for name, norm in batch_norms(encoder).items() if norm.training}
        assert at_work == (parts if batch_norm == "trained" else set())
        assert learning(encoder) == parts
        assert {name.partition(".")[0] for name in trained_parameters(encoder)} == parts
        assert {name.partition(".")[0] for name in changed_statistics(encoder)} == (
            parts if batch_norm == "trained" else set()
        )


def test_layers_below_the_first_trained_stage_run_outside_the_graph() -> None:
    encoder = build(trainable=("layer4",)).train()
    seen = []
    encoder.backbone.layer3.register_forward_hook(lambda _, __, grid: seen.append(grid.requires_grad))
    assert encoder(random_images()).requires_grad
    assert seen == [False]


@pytest.mark.parametrize("parts", [("layer4", "layer4.1"), ("layer4.1", "layer4"), ("layer3", "layer3")])
def test_overlapping_stages_are_refused(parts) -> None:
    with pytest.raises(UserError, match=f"'{parts[0]}' and '{parts[1]}' overlap"):
        build(trainable=parts)


# ---- less memory


def step(encoder: Encoder) -> tuple[dict[str, Tensor], int]:
    """Return the gradients and statistics of a training step, and the bytes that it kept for them."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encoder.train()(random_images(4))
        weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    generator = torch.Generator().manual_seed(2)
    (features * torch.rand(features.shape, generator=generator)).sum().backward()
    found = {
        name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.requires_grad
    }
    buffers = dict(encoder.named_buffers())
    return found | buffers, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize(
    ("name", "part"),
    [("resnet18", "all"), ("resnet50", "layer4"), ("mobilenet_v2", "all")],
)
@pytest.mark.parametrize("batch_norm", ["frozen", "trained"])
def test_checkpointing_keeps_less_and_changes_neither_gradients_nor_statistics(
    name, part, batch_norm
) -> None:
    trainable = part if part == "all" else (part,)
    plain, plain_bytes = step(build(name, trainable=trainable, batch_norm=batch_norm))
    lean, lean_bytes = step(build(name, trainable=trainable, batch_norm=batch_norm, grad_checkpointing=True))
    assert plain.keys() == lean.keys()
    for key, tensor in plain.items():
        assert torch.equal(tensor, lean[key]), key
    assert lean_bytes * 6 < plain_bytes
