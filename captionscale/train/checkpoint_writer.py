"""Asynchronous writing of checkpoints: training waits only until the tensors are copied."""

import copy
import ctypes
import errno
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from captionscale import toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.files import sha256_of
from captionscale.model.captioner import Captioner
from captionscale.progress import say
from captionscale.train.checkpoint import FORMAT
from captionscale.train.disk_space import aligned, check_disk_space, checkpoint_bytes
from captionscale.train.run_folder import (
    CONFIG_FILE,
    EMA_FILE,
    MODEL_FILE,
    OLD_SUFFIX,
    OPTIMIZER_FILE,
    STATE_FILE,
    VOCAB_FILE,
    checkpoint_folder,
    checkpoint_steps,
    remove_partial_checkpoints,
)
from captionscale.train.state import TrainState
from captionscale.version import __version__
from captionscale.vocab import Vocabulary

_DENSE = (torch.contiguous_format, torch.channels_last)


class CheckpointWriter:
    """Writes a run's checkpoints in a background thread, one at a time.

    The thread releases the GIL while it writes, hashes and waits for the disk.
    """

    def __init__(self, run: Path, config: Config, vocabulary: Vocabulary, fingerprint: Mapping[str, Any]):
        """Start the thread."""
        self._run, self._config, self._vocabulary = run, config, vocabulary
        self._fingerprint = copy.deepcopy(dict(fingerprint))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._writing: Future[tuple[int, dict[str, float]]] | None = None
        self._written: dict[int, dict[str, float]] = {}

    def reserve(self, captioner: Captioner) -> None:
        """Check disk space and allocate the buffer for the copies.

        Raises:
            UserError: Too little disk space.
        """
        size = checkpoint_bytes(captioner, bool(self._config.train.ema_decay))
        check_disk_space(self._run, size, self._config.train.keep_checkpoints)
        self._make_buffer(size, next(captioner.parameters()).device)

    def save(self, train_state: TrainState, *tensors: Mapping[str, Tensor]) -> None:
        """Wait for the previous checkpoint, copy the tensors, and begin to `write`.

        Raises:
            UserError: The previous checkpoint could not be written.
        """
        began = time.monotonic()
        self.wait()
        state, copies = copy.deepcopy(train_state), self._copy(*tensors)
        wait_s = time.monotonic() - began

        def write() -> tuple[int, dict[str, float]]:
            began = time.monotonic()
            self.write(state, *copies)
            return state.step, {"save_wait_s": wait_s, "save_s": time.monotonic() - began}

        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: It could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            step, seconds = writing.result()
            self._written[step] = seconds

    def pop_timings(self) -> dict[int, dict[str, float]]:
        """Return the seconds of each checkpoint completed since the last call, by step.

        `save_wait_s` is the time that training waited, `save_s` that of writing.

        Raises:
            UserError: One could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()
        written, self._written = self._written, {}
        return written

    def close(self) -> None:
        """Wait for the last checkpoint; an error is only a warning, as another one may have ended the run."""
        try:
            self.wait()
        except UserError as error:
            say(f"warning: {error}")
        self._thread.shutdown()
        # Pinned memory is scarce, and the process may live on.
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def write(self, train_state: TrainState, *tensors: Mapping[str, Tensor]) -> None:
        """Write weights, optimizer state and moving average, if any; remove checkpoints that are not kept.

        It gets its name when it is on disk: a kill, a full disk or a power cut never leaves a torn one.

        Raises:
            UserError: The disk is full or cannot be written.
        """
        run, folder = self._run, checkpoint_folder(self._run, train_state.step)
        partial = _partial(folder)
        try:
            remove_partial_checkpoints(run)
            partial.mkdir(parents=True)
            for group, name in zip(tensors, (MODEL_FILE, OPTIMIZER_FILE, EMA_FILE), strict=False):
                save_file({key: tensor.contiguous() for key, tensor in group.items()}, partial / name)
            write_metadata(partial, train_state, self._fingerprint, self._config, self._vocabulary)
            for path in (*partial.iterdir(), partial):
                _sync(path)
            if folder.exists():
                folder.rename(folder.with_name(folder.name + OLD_SUFFIX))
            partial.rename(folder)
            for path in (folder.parent, run):
                _sync(path)
            self._remove_old(train_state)
            remove_partial_checkpoints(run)
        # OSError, or the error that safetensors makes of it.
        except Exception as error:
            remove_partial_checkpoints(run)
            raise UserError(
                f"{folder}: cannot be written ({error}); the checkpoints before it are whole;"
                " free the disk and train again with the same --out"
            ) from None

    def _remove_old(self, state: TrainState) -> None:
        # Later ones are damaged: the run was resumed from before them.
        earlier = [step for step in checkpoint_steps(self._run) if step <= state.step]
        kept = {*earlier[-self._config.train.keep_checkpoints :], state.best_step}
        if state.scored_step < state.validated_step:
            kept.add(state.validated_step)  # It may turn out to be the best.
        for step in checkpoint_steps(self._run):
            if step not in kept:
                checkpoint_folder(self._run, step).rename(_partial(checkpoint_folder(self._run, step)))

    def _copy(self, *groups: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Copy tensors into the buffer, one after the other."""
        tensors = [tensor for group in groups for tensor in group.values()]
        sizes = [aligned(tensor.nbytes) for tensor in tensors]
        if sum(sizes) > len(self._buffer):
            self._make_buffer(sum(sizes), tensors[0].device)
        places = iter(torch.split(self._buffer[: sum(sizes)], sizes))
        copies = [{name: _copied(tensor, next(places)) for name, tensor in group.items()} for group in groups]
        if self._buffer.is_pinned():
            torch.cuda.synchronize()
        return copies

    def _make_buffer(self, size: int, device: torch.device) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        # Touch the pages now, so that no step waits for the system to map them.
        self._buffer.zero_()


def write_metadata(
    folder: Path, state: TrainState, fingerprint: Mapping[str, Any], config: Config, vocabulary: Vocabulary
) -> None:
    """Complete a checkpoint's folder with config, vocabulary, state and the checksums of all files."""
    (folder / CONFIG_FILE).write_text(toml.dumps(config), encoding="utf-8")
    vocabulary.save(folder / VOCAB_FILE)
    content = {
        "format": FORMAT,
        "captionscale": __version__,
        **asdict(state),
        "fingerprint": dict(fingerprint),
        "sha256": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
    }
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _copied(tensor: Tensor, place: Tensor) -> Tensor:
    flat = place[: tensor.nbytes].view(tensor.dtype)
    if not any(tensor.is_contiguous(memory_format=form) for form in _DENSE):
        return flat.view(tensor.shape).copy_(tensor, non_blocking=True)
    # In its own memory format; the writing thread reorders it.
    copied = flat.as_strided(tensor.shape, tensor.stride())
    if tensor.device.type != "cpu":
        return copied.copy_(tensor, non_blocking=True)
    # Bypasses the caches; `copy_` would first read what it overwrites.
    ctypes.memmove(copied.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return copied
