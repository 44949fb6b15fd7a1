"""Safetensors files, whose header is checked before a tensor is read."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from captionscale.files import MB, open_file

_MAX_HEADER_BYTES = 10 * MB
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}
"""Those that a captioner has, by the names of the format."""

Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""The format's name of each tensor's dtype, and its shape."""


def read_header(path: Path) -> Header:
    """Return what a file holds, which is proven to fit its size.

    Raises:
        ValueError: It is not a safetensors file.
        OSError: It cannot be read.
    """
    with open_file(path) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
    try:
        with safe_open(path, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except SafetensorError as error:
        raise ValueError(" ".join(str(error).split())) from None


def load(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with the expected names, dtypes and shapes, and no others.

    Raises:
        ValueError: It is not a safetensors file, or holds other tensors.
        OSError: It cannot be read.
    """
    found = read_header(path)
    fitting = {name: (_DTYPES[each.dtype], tuple(each.shape)) for name, each in expected.items()}
    differing = sorted(name for name in found.keys() | fitting.keys() if found.get(name) != fitting.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{len(differing):,} tensors are not the model's, the first {name!r:.80}: found"
            f" {_described(found, name)}, expected {_described(fitting, name)}"
        )
    return load_file(path)


def _described(header: Header, name: str) -> str:
    if name not in header:
        return "none"
    dtype, shape = header[name]
    return f"{dtype} {list(shape)}"
