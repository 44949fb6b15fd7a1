"""Pretrained encoder weights: torchvision's, or a file."""

import os
from pathlib import Path
from urllib.error import URLError
from zipfile import ZipFile, is_zipfile

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from captionscale import safetensors_file
from captionscale.config_model import EncoderConfig
from captionscale.errors import UserError
from captionscale.files import open_file
from captionscale.progress import spinner

_CLASSIFIERS = ("fc.", "classifier.")


def load_into(backbone: nn.Module, state: dict[str, Tensor], config: EncoderConfig) -> None:
    """Load weights by torchvision's parameter names into a backbone, without a classifier's.

    Raises:
        UserError: The tensors are another network's.
    """
    state = {key: tensor for key, tensor in state.items() if not key.startswith(_CLASSIFIERS)}
    expected = backbone.state_dict()
    differing = [
        key
        for key in sorted(expected.keys() | state.keys())
        # Old files lack this counter, which is not used.
        if not key.endswith("num_batches_tracked")
        and (key not in state or key not in expected or state[key].shape != expected[key].shape)
    ]
    if differing:
        raise UserError(
            f"model.encoder.weights = {config.weights!r}: {len(differing)} tensors are missing, surplus or of"
            f" another shape, the first '{differing[0]}'; expected the weights of {config.name};"
            " set model.encoder.name to the model that they belong to"
        )
    backbone.load_state_dict(state, strict=False)


def download(name: str) -> dict[str, Tensor]:
    """Return the first ImageNet weights that torchvision published for a network.

    The later ones (IMAGENET1K_V2) classify better, but published captioners use the first.

    Raises:
        UserError: No connection, and no file from an earlier download.
    """
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        with spinner(f"loading torchvision's weights of {name}"):
            state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"model.encoder.weights = 'imagenet': {weights.url} cannot be downloaded ({reason}); expected a"
            f" network or the file in {torch.hub.get_dir()}/checkpoints; download it elsewhere, then set"
            " model.encoder.weights to its path"
        ) from None
    return state


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pth file.

    Raises:
        UserError: No such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(
            f"model.encoder.weights = '{path}': no such file; expected 'imagenet', 'none', or a .safetensors"
            " or .pth file (a relative path starts at the folder you are in)"
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
    # Damaged files make both readers raise nearly anything.
    except Exception as error:
        raise UserError(
            f"{path}: not a file of weights ({type(error).__name__}); expected a dictionary of tensors;"
            " download it again"
        ) from None


def _refuse_compressed(path: Path) -> None:
    """Raise ValueError if tensors could be larger than the file; PyTorch does not compress."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if is_zipfile(file):
            with ZipFile(file) as packed:
                if sum(each.file_size for each in packed.infolist()) > size:
                    raise ValueError
