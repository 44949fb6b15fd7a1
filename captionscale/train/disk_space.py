"""Disk space for checkpoints."""

import ctypes
import errno
import os
import shutil
import tempfile
from pathlib import Path

from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.train.run_folder import checkpoints_folder

# No dtype is wider, so a tensor may begin at any multiple of it.
_ALIGNMENT_BYTES = 16


def aligned(size: int) -> int:
    """Return a size in bytes, rounded up to the alignment of tensors."""
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def checkpoint_bytes(captioner: Captioner, averaged: bool) -> int:
    """Return the size of a captioner's checkpoint."""
    weights = list(captioner.state_dict().values())
    trainable = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    # AdamW keeps two moments of each parameter, and a count of its steps.
    tensors = [*weights * (1 + averaged), *trainable * 2]
    return sum(aligned(tensor.nbytes) for tensor in tensors) + len(trainable) * _ALIGNMENT_BYTES


def check_disk_space(run: Path, size: int, keep: int) -> None:
    """Refuse a disk without space for checkpoints of `size` bytes: `keep`, best, being scored, being written.

    Raises:
        UserError: Too little space or quota.
    """
    folder = next(each for each in (run, *run.absolute().parents) if each.exists())
    held = sum(path.stat().st_size for path in checkpoints_folder(run).glob("*/*"))
    missing = (keep + 3) * size - held
    if missing <= 0:
        return
    try:
        free = shutil.disk_usage(folder).free
        found = f"{free / 1e9:,.2f} GB are free" if free < missing else _allocation_error(folder, missing)
    except OSError as error:
        found = f"cannot be written ({error.strerror})"
    if found:
        raise UserError(
            f"{run}: {found}, expected {missing / 1e9:,.2f} GB more for {keep + 3:,} checkpoints of"
            f" {size / 1e9:,.2f} GB (train.keep_checkpoints = {keep:,}, the best, one being scored, one being"
            " written); free the disk, lower train.keep_checkpoints, or take --out elsewhere"
        )


def _allocation_error(folder: Path, size: int) -> str:
    """Try to allocate so many bytes, as free space does not show quotas; return the error, if any."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        # Not os.posix_fallocate: where a file system cannot allocate, it writes each block, for minutes.
        failed = libc.fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size))
    code = ctypes.get_errno()
    return os.strerror(code).lower() if failed and code in (errno.ENOSPC, errno.EDQUOT) else ""
