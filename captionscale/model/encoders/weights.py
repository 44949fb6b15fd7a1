"""Pretrained encoder weights: torchvision's download, or a file."""

import os
from pathlib import Path
from urllib.error import URLError
from zipfile import ZipFile, is_zipfile

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from captionscale import safetensors_file
from captionscale.errors import UserError
from captionscale.files import open_file
from captionscale.progress import spinner

_CLASSIFIERS = ("fc.", "classifier.")


def load_into(backbone: nn.Module, name: str, weights: str) -> None:
    """Give a backbone its weights.

    Args:
        backbone: Module with torchvision's parameter names, without the classifier.
        name: Of the torchvision model.
        weights: `imagenet`, `none`, or a .safetensors or .pth file.

    Raises:
        UserError: No network, no file, or a file whose tensors are not this model's.
    """
    if weights == "none":
        return
    state = _download(name) if weights == "imagenet" else _read(Path(weights))
    state = {key: tensor for key, tensor in state.items() if not key.startswith(_CLASSIFIERS)}
    wanted = backbone.state_dict()
    differing = [
        key
        for key in sorted(wanted.keys() | state.keys())
        if key not in state or key not in wanted or state[key].shape != wanted[key].shape
    ]
    # Batch-norm's count of batches serves no one here, and old files lack it.
    differing = [key for key in differing if not key.endswith("num_batches_tracked")]
    if differing:
        raise UserError(
            f"model.encoder.weights = {weights!r}: {len(differing)} tensors are missing, surplus or of"
            f" another shape, the first '{differing[0]}'; wanted the weights of torchvision's {name};"
            " set model.encoder.name to the model that they belong to"
        )
    backbone.load_state_dict(state, strict=False)


def _download(name: str) -> dict[str, Tensor]:
    """Return the first ImageNet weights that torchvision published for a model.

    The later ones (IMAGENET1K_V2) classify better, but published captioners stand on the first.
    """
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        with spinner(f"loading torchvision's weights of {name}"):
            state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"model.encoder.weights = 'imagenet': {weights.url} cannot be downloaded ({reason}); wanted a"
            f" network or the file in {torch.hub.get_dir()}/checkpoints; download it elsewhere, then set"
            " model.encoder.weights to its path"
        ) from None
    return state


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"model.encoder.weights = '{path}': no such file; wanted 'imagenet', 'none', or a .safetensors or"
            " .pth file (a relative path starts at the folder you are in)"
        )
    try:
        if path.suffix == ".safetensors":
            safetensors_file.read_header(path)
            return load_file(path)
        _refuse_compressed(path)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError
        return state
    # Damaged files make both readers raise nearly anything; all of it means the same to a user.
    except Exception as error:
        raise UserError(
            f"{path}: not a file of weights ({type(error).__name__}); wanted a dictionary of tensors;"
            " download it again"
        ) from None


def _refuse_compressed(path: Path) -> None:
    """Refuse a file whose tensors could be larger than itself, which PyTorch does not write."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if is_zipfile(file):
            with ZipFile(file) as packed:
                if sum(each.file_size for each in packed.infolist()) > size:
                    raise ValueError
