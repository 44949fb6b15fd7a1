from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from captionscale.config_model import TorchvisionConfig as Settings
from captionscale.errors import UserError
from captionscale.model.encoders.torchvision import TorchvisionEncoder as Encoder

REAL = Path(__file__).parents[2].parent / "shared/data/weights/mobilenet_v2_features.safetensors"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """What torchvision publishes of a ResNet-18: the classifier too."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).state_dict()


def write(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def load(path: str | Path, name: str = "resnet18") -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(Settings(name=name, weights=str(path)))
    encoder.load_pretrained()
    return encoder


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_backbone_gets_every_tensor_of_a_file_but_the_classifiers(published, tmp_path, suffix) -> None:
    state = load(write(published, tmp_path / f"resnet18{suffix}")).backbone.state_dict()
    assert {*published} - {*state} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, published[name]) for name, tensor in state.items())


def test_files_from_before_batch_norm_counted_batches_are_read(published, tmp_path) -> None:
    old = {name: tensor for name, tensor in published.items() if not name.endswith("num_batches_tracked")}
    backbone = load(write(old, tmp_path / "old.pth")).backbone
    assert torch.equal(backbone.state_dict()["layer4.1.bn2.weight"], published["layer4.1.bn2.weight"])


def test_without_weights_the_backbone_stays_unchanged() -> None:
    torch.manual_seed(1)
    before = Encoder(Settings(name="mobilenet_v2")).backbone.state_dict()
    after = load("none", "mobilenet_v2").backbone.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.skipif(not REAL.exists(), reason="the real weights are not next to the checkout")
def test_the_real_weights_of_mobilenet_are_its_own() -> None:
    encoder = load(REAL, "mobilenet_v2").eval()
    features = encoder(torch.zeros((1, 3, 64, 64), dtype=torch.uint8))
    assert features.shape == (1, 4, 1280)
    # ReLU6 and trained statistics: neither dead nor saturated, as wrong names or shapes would leave them.
    assert 0.01 < (features > 0).float().mean() < 0.99
    assert 0 < features.max() < 6.01


@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v2"])
def test_another_networks_weights_are_refused(published, tmp_path, name) -> None:
    path = write(published, tmp_path / "resnet18.safetensors")
    with pytest.raises(UserError) as caught:
        load(path, name)
    place, _, rest = str(caught.value).partition(": ")
    assert place == f"model.encoder.weights = '{path}'"
    found, expected, cure = rest.split("; ")
    assert "tensors are missing, surplus or of another shape, the first '" in found
    assert expected == f"expected the weights of {name}"
    assert cure == "set model.encoder.name to the model that they belong to"


def test_a_tensor_of_another_shape_is_refused_by_its_name(published, tmp_path) -> None:
    wider = {**published, "layer1.0.conv1.weight": torch.zeros(64, 64, 5, 5)}
    with pytest.raises(UserError, match=r": 1 tensors .* the first 'layer1\.0\.conv1\.weight'"):
        load(write(wider, tmp_path / "wider.safetensors"))


def test_the_error_about_a_missing_file_names_the_valid_choices(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path / "absent.pth")
    assert str(caught.value).startswith(
        f"model.encoder.weights = '{tmp_path / 'absent.pth'}': no such file; "
    )
    assert "expected 'imagenet', 'none', or a .safetensors or .pth file" in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 7, 1000, 30_000])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept) -> None:
    path = write({"layer1.0.conv1.weight": torch.zeros(100, 100)}, tmp_path / f"whole{suffix}")
    path.write_bytes(path.read_bytes()[:kept])
    assert_no_weights(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_text_is_refused(tmp_path, suffix) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text("<!DOCTYPE html><title>404 Not Found</title>\n" * 20, encoding="utf-8")
    assert_no_weights(path)


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], torch.zeros(2), {"epoch": 3, "model": {}}, Path("run me")]
)
def test_a_file_of_other_things_than_tensors_is_refused(tmp_path, content) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert_no_weights(tmp_path / "other.pth")


def assert_no_weights(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(path)
    found, expected, cure = str(caught.value).split("; ")
    assert found.startswith(f"{path}: not a file of weights (")
    assert (expected, cure) == ("expected a dictionary of tensors", "download it again")


def test_the_error_without_a_network_names_the_address_and_a_way_around(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(UserError) as caught:
        load("imagenet")
    assert str(caught.value) == (
        "model.encoder.weights = 'imagenet': https://download.pytorch.org/models/resnet18-f37072fd.pth"
        " cannot be downloaded (Name or service not known);"
        f" expected a network or the file in {tmp_path}/hub/checkpoints;"
        " download it elsewhere, then set model.encoder.weights to its path"
    )


def test_imagenet_is_the_file_that_was_downloaded_before(published, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    write(published, tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    assert torch.equal(load("imagenet").backbone.state_dict()["conv1.weight"], published["conv1.weight"])
