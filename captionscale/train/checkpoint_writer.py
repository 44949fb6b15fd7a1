"""Checkpoints are written while training goes on; a step waits only until its tensors are copied."""

import copy
import ctypes
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.progress import say
from captionscale.train import checkpoints
from captionscale.train.run_folder import checkpoints_folder
from captionscale.train.state import TrainState
from captionscale.vocab import Vocabulary

# No number type is wider, so that each tensor may begin at any multiple of it.
_ALIGNMENT_BYTES = 16
_DENSE = (torch.contiguous_format, torch.channels_last)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, in a thread of its own.

    The thread does nothing but what lets other threads run: writing, hashing, waiting for the disk.
    """

    def __init__(self, run: Path, config: Config, vocabulary: Vocabulary, fingerprint: Mapping[str, Any]):
        """Take what is the same in each of a run's checkpoints.

        Args:
            run: The run's folder.
            config: The experiment.
            vocabulary: Its words.
            fingerprint: What may not change within the run.
        """
        self._run, self._config, self._vocabulary = run, config, vocabulary
        self._fingerprint = copy.deepcopy(dict(fingerprint))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._writing: Future[tuple[int, dict[str, float]]] | None = None
        self._written: dict[int, dict[str, float]] = {}

    def reserve(self, captioner: Captioner) -> None:
        """Make ready to save a captioner: the disk can hold all that will be kept, the copies have memory.

        Raises:
            UserError: The disk cannot.
        """
        size = checkpoint_bytes(captioner, bool(self._config.train.ema_decay))
        check_disk_space(self._run, size, self._config.train.keep_checkpoints)
        self._make_buffer(size, next(captioner.parameters()).device)

    def save(
        self,
        train_state: TrainState,
        weights: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor],
        ema: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy what is to be saved and begin to write it; first wait for the one before, if need be.

        Args:
            train_state: How far the run is.
            weights: The captioner's.
            optimizer_state: The optimiser's, as `Engine.optimizer_state` gives it.
            ema: The weights' moving average, if the run has one.

        Raises:
            UserError: The one before could not be written.
        """
        began = time.monotonic()
        self.wait()
        copies = self._copies(weights, optimizer_state, ema or {})
        wait_s = time.monotonic() - began
        self._writing = self._thread.submit(self._timed, copy.deepcopy(train_state), wait_s, copies)

    def wait(self) -> None:
        """Return when what was saved is on the disk.

        Raises:
            UserError: It could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            step, seconds = writing.result()
            self._written[step] = seconds

    def pop_timings(self) -> dict[int, dict[str, float]]:
        """Return the checkpoints that came to the disk since the last call, without waiting for any.

        Returns:
            For each step, the seconds that the loop waited (`save_wait_s`) and the writing took (`save_s`).

        Raises:
            UserError: One could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()
        written, self._written = self._written, {}
        return written

    def close(self) -> None:
        """Let the one that is being written come to its end, whatever ended the run."""
        try:
            self.wait()
        except UserError as error:
            say(f"warning: {error}")
        self._thread.shutdown()
        # Pinned memory is dear, and the process may live on.
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _timed(
        self, train_state: TrainState, wait_s: float, copies: list[dict[str, Tensor]]
    ) -> tuple[int, dict[str, float]]:
        began = time.monotonic()
        weights, optimizer_state, ema = copies
        checkpoints.save(
            self._run,
            train_state,
            self._fingerprint,
            weights,
            optimizer_state,
            self._config,
            self._vocabulary,
            ema or None,
        )
        return train_state.step, {"save_wait_s": wait_s, "save_s": time.monotonic() - began}

    def _copies(self, *groups: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the tensors as they are now, one after the other in this host's memory."""
        tensors = [tensor for group in groups for tensor in group.values()]
        sizes = [_aligned(tensor.nbytes) for tensor in tensors]
        if sum(sizes) > len(self._buffer):
            self._make_buffer(sum(sizes), tensors[0].device)
        places = iter(torch.split(self._buffer[: sum(sizes)], sizes))
        copies = [{name: _copied(tensor, next(places)) for name, tensor in group.items()} for group in groups]
        if self._buffer.is_pinned():
            torch.cuda.synchronize()
        return copies

    def _make_buffer(self, size: int, device: torch.device) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        # The system hands memory out when it is first written to, which is to be now and not in a step.
        self._buffer.zero_()


def _copied(tensor: Tensor, place: Tensor) -> Tensor:
    flat = place[: tensor.nbytes].view(tensor.dtype)
    if not any(tensor.is_contiguous(memory_format=form) for form in _DENSE):
        return flat.view(tensor.shape).copy_(tensor, non_blocking=True)
    # In its own order: the thread that writes has the time to change it.
    copied = flat.as_strided(tensor.shape, tensor.stride())
    if tensor.device.type != "cpu":
        return copied.copy_(tensor, non_blocking=True)
    # Past the processor's caches, where `copy_` first reads what it is to overwrite.
    ctypes.memmove(copied.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return copied


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def checkpoint_bytes(captioner: Captioner, averaged: bool) -> int:
    """Return how large a captioner's checkpoint is.

    Args:
        captioner: It may be on the device `meta`.
        averaged: Whether the run keeps a moving average.
    """
    weights = list(captioner.state_dict().values())
    learning = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    # AdamW keeps two moments of each parameter, and a count of its steps.
    tensors = (*weights, *(weights if averaged else []), *learning, *learning)
    return sum(_aligned(tensor.nbytes) for tensor in tensors) + len(learning) * _ALIGNMENT_BYTES


def check_disk_space(run: Path, size: int, keep: int, folder: Path | None = None) -> None:
    """Refuse a disk that cannot hold a run's checkpoints: kept, best, being scored, being written.

    Args:
        run: The run's folder.
        size: Of a checkpoint, in bytes.
        keep: As `train.keep_checkpoints`.
        folder: On the same disk, if that of the run is not there yet.

    Raises:
        UserError: There is no room, or a quota.
    """
    folder = folder or run
    held = sum(path.stat().st_size for path in checkpoints_folder(run).glob("*/*"))
    missing = (keep + 3) * size - held
    if missing <= 0:
        return
    try:
        free = shutil.disk_usage(folder).free
        found = f"{free / 1e9:,.2f} GB are free" if free < missing else _no_allocation(folder, missing)
    except OSError as error:
        found = f"cannot be written ({error.strerror})"
    if found:
        raise UserError(
            f"{run}: {found}, wanted {missing / 1e9:,.2f} GB more for {keep + 3:,} checkpoints of"
            f" {size / 1e9:,.2f} GB (train.keep_checkpoints = {keep:,}, the best, one being scored, one being written);"
            " free the disk, lower train.keep_checkpoints, or take --out elsewhere"
        )


def _no_allocation(run: Path, size: int) -> str:
    """Return why the disk does not give so many bytes: a quota is in no count of what is free."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryFile(dir=run) as file:
        # Not os.posix_fallocate: where a file system cannot allocate, it writes each block, for minutes.
        failed = libc.fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size))
    code = ctypes.get_errno()
    return os.strerror(code).lower() if failed and code in (errno.ENOSPC, errno.EDQUOT) else ""
