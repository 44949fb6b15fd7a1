"""Checkpoints: one format for every engine and any number of ranks, whole or not there.

A run keeps them in `checkpoints/step-00012000/`: `model.safetensors`, `optimizer.safetensors`, with
`train.ema_decay` also `ema.safetensors`, `state.json` (step, fingerprint, best score, checksums),
`config.toml` and `vocab.json`. Nothing is pickled.
What is being written, or on its way out, ends in `.tmp`.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from captionscale import toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.files import sha256_of
from captionscale.progress import say
from captionscale.train.checkpoint import FORMAT, Checkpoint, CheckpointVersionError
from captionscale.train.fingerprint import resume_conflicts
from captionscale.train.run_folder import (
    CONFIG_FILE,
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    VOCAB_FILE,
    checkpoint_folder,
    checkpoint_steps,
    partial_checkpoints,
    require_run,
    unknown_file_warnings,
)
from captionscale.train.state import TrainState
from captionscale.version import __version__
from captionscale.vocab import Vocabulary

_OLD = ".old.tmp"
"""Ends the name of a checkpoint while another of the same step takes its place."""


def save(
    run: Path,
    train_state: TrainState,
    fingerprint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    config: Config,
    vocabulary: Vocabulary,
    ema: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, then remove those that `train.keep_checkpoints` does not keep.

    It is on the disk before it takes its name, so that a kill, a full disk or a power cut leaves the others
    whole and never a torn one among them.

    Args:
        run: The run's folder.
        train_state: How far it is.
        fingerprint: What may not change within a run.
        weights: The captioner's.
        optimizer_state: The optimiser's, as `Engine.optimizer_state` gives it.
        config: The experiment.
        vocabulary: Its words.
        ema: The weights' moving average, if the run has one.

    Raises:
        UserError: The disk refuses.
    """
    folder = checkpoint_folder(run, train_state.step)
    partial = _passing(folder)
    try:
        remove_partial(run)
        partial.mkdir(parents=True)
        for tensors, name in ((weights, MODEL_FILE), (optimizer_state, OPTIMIZER_FILE), (ema, EMA_FILE)):
            if tensors is not None:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial / name)
        write_metadata(partial, train_state, fingerprint, config, vocabulary)
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if folder.exists():
            folder.rename(folder.with_name(folder.name + _OLD))
        partial.rename(folder)
        for path in (folder.parent, run):
            _flush(path)
        # A later one can only be a damaged one that this run was resumed before.
        earlier = [step for step in checkpoint_steps(run) if step <= train_state.step]
        kept = {*earlier[-config.train.keep_checkpoints :], train_state.best_step}
        if train_state.scored_step < train_state.validated_step:
            kept.add(train_state.validated_step)  # It may turn out to be the best.
        for step in checkpoint_steps(run):
            if step not in kept:
                checkpoint_folder(run, step).rename(_passing(checkpoint_folder(run, step)))
        remove_partial(run)
    # Neither a full disk's OSError nor safetensors' own error about it may cost the checkpoints before.
    except Exception as error:
        remove_partial(run)
        raise UserError(
            f"{folder}: cannot be written ({error}); the checkpoints before it are whole;"
            " free the disk and train again with the same --out"
        ) from None


def write_metadata(
    folder: Path,
    train_state: TrainState,
    fingerprint: Mapping[str, Any],
    config: Config,
    vocabulary: Vocabulary,
) -> None:
    """Write what a checkpoint has besides what is in its folder already, and the checksums of all."""
    (folder / CONFIG_FILE).write_text(toml.dumps(config), encoding="utf-8")
    vocabulary.save(folder / VOCAB_FILE)
    state = {
        "format": FORMAT,
        "captionscale": __version__,
        **asdict(train_state),
        "fingerprint": dict(fingerprint),
        "sha256": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def remove_partial(run: Path) -> None:
    """Remove what a killed process was writing, and what is no longer kept."""
    for path in partial_checkpoints(run):
        whole = path.with_name(path.name.removesuffix(_OLD))
        if path.name.endswith(_OLD) and not whole.exists():
            # The one that was to take its place has not come.
            with suppress(OSError):
                path.rename(whole)
            continue
        # On NFS a folder stays while another process reads in it; the next save tries again.
        shutil.rmtree(path, ignore_errors=True)


def find_latest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole; none if there is none at all.

    Args:
        run: The run's folder.
        warn: Told of each damaged one that is passed over, and of what training did not write.

    Raises:
        UserError: There are some, all of them damaged; or the newest whole one is of another version.
    """
    for warning in unknown_file_warnings(run):
        warn(f"warning: {warning}")
    for step in reversed(checkpoint_steps(run)):
        try:
            return _checkpoint(run, step)
        except CheckpointVersionError:
            # To go on from an older one would throw this one away.
            raise
        except UserError as error:
            warn(f"warning: passed over: {error}")
    if checkpoint_steps(run):
        raise UserError(
            f"{run}: every checkpoint is damaged; copy the run again, or train it into another --out"
        )
    return None


def resume(run: Path, fingerprint: Mapping[str, Any], tell: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint that a run goes on from; none if it is to start.

    Args:
        run: The run's folder.
        fingerprint: What the run would do now.
        tell: Told where it goes on, and of damaged checkpoints that are passed over.

    Raises:
        UserError: The run did something else so far, or all its checkpoints are damaged.
    """
    remove_partial(run)
    saved = find_latest(run, tell)
    if saved is not None:
        if conflicts := resume_conflicts(saved.fingerprint, fingerprint):
            raise UserError(
                f"{saved.folder}: cannot go on with another experiment: {'; '.join(conflicts)};"
                " set these back, or take another --out"
            )
        tell(f"{run}: going on from step {saved.train_state.step:,}")
    return saved


def open_checkpoint(run: Path, which: str = "best") -> Checkpoint:
    """Return a run's checkpoint to caption with.

    Args:
        run: The run's folder; or one checkpoint's, wherever it is, such as `export --format hub` wrote.
        which: `best`, `last`, or a step.

    Raises:
        UserError: No run, no such checkpoint, or a damaged one.
    """
    require_run(run)
    if (run / STATE_FILE).is_file():
        return Checkpoint(run)
    last = find_latest(run, say)
    if last is None:
        raise UserError(
            f"{run}: no checkpoint, so no run; wanted the --out of captionscale train; correct the path, or"
            " wait until it has saved"
        )
    if which == "last" or (which == "best" and not last.train_state.best_step):
        return last
    if which == "best":
        step = last.train_state.best_step
    elif which.isdecimal() and len(which) <= 12:
        step = int(which)
    else:
        raise UserError(f"--checkpoint {which}: wanted best, last, or a step: {checkpoint_steps(run)}")
    if step not in checkpoint_steps(run):
        raise UserError(
            f"{run}: no checkpoint of step {step}; there are {checkpoint_steps(run)}; take one of these, or"
            " --checkpoint last"
        )
    return _checkpoint(run, step)


def _checkpoint(run: Path, step: int) -> Checkpoint:
    saved = Checkpoint(checkpoint_folder(run, step))
    if saved.train_state.step != step:
        raise UserError(
            f"{saved.folder}: holds step {saved.train_state.step:,}, expected step {step:,} as its name says;"
            " rename it"
        )
    return saved


def _passing(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do so for folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
