"""Checkpoints: their format, reading and finding them; one format for all engines and any number of ranks.

A run keeps them in `checkpoints/step-00012000/`: `model.safetensors`, `optimizer.safetensors`, with
`train.ema_decay` also `ema.safetensors`, `state.json` (step, fingerprint, best score, checksums),
`config.toml` and `vocab.json`. Nothing is pickled. Names of partial ones end in `.tmp`.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from captionscale import parsing, safetensors_file, toml, vocab
from captionscale.config import Config
from captionscale.distributed.engine import MOMENTS
from captionscale.errors import UserError
from captionscale.files import UnfitFileError, read_file, sha256_of
from captionscale.model.captioner import Captioner
from captionscale.progress import say
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
    remove_partial_checkpoints,
    require_run,
    unknown_file_warnings,
)
from captionscale.train.state import TrainState
from captionscale.version import __version__
from captionscale.vocab import Vocabulary

FORMAT = 1
_REQUIRED = {MODEL_FILE, CONFIG_FILE, VOCAB_FILE}
_KNOWN = _REQUIRED | {OPTIMIZER_FILE, EMA_FILE}

_Plain = str | int | float | bool | None
_Text = Annotated[str, msgspec.Meta(pattern=r"^[\w.+-]{1,40}$")]


class _Version(msgspec.Struct):
    format: int
    captionscale: _Text = "of another version"


class _State(msgspec.Struct):
    """What `state.json` holds besides a `TrainState`."""

    captionscale: _Text
    fingerprint: dict[str, _Plain | list[_Plain]]
    sha256: dict[str, Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]]


_VERSION = msgspec.json.Decoder(_Version)
_STATE = msgspec.json.Decoder(_State)
_TRAIN_STATE = msgspec.json.Decoder(TrainState)


class CheckpointVersionError(UserError):
    """A whole checkpoint in the format of another version."""


class Checkpoint:
    """A checkpoint on disk, verified by its checksums."""

    def __init__(self, folder: Path):
        """Read the state and verify the checksums of all files.

        Raises:
            CheckpointVersionError: Another format.
            UserError: A missing or damaged file.
            OSError: A file that cannot be read.
        """
        self.folder = folder
        try:
            data = read_file(folder / STATE_FILE)
            version = parsing.decode(data, _VERSION)
            if version.format != FORMAT:
                raise CheckpointVersionError(
                    f"{folder}: a checkpoint of format {version.format}, written by captionscale"
                    f" {version.captionscale}; expected format {FORMAT}, which"
                    f" captionscale {__version__} reads; take the version that wrote it, or another run"
                )
            self._state = parsing.decode(data, _STATE)
            self.train_state = parsing.decode(data, _TRAIN_STATE)
            state, files = self.train_state, self._state.sha256.keys()
            # Of other names, no path is ever opened.
            if unknown := sorted(files - _KNOWN):
                raise ValueError(f"{STATE_FILE}: sha256 of {unknown[0]!r:.80}, which no checkpoint holds")
            if missing := sorted(_REQUIRED - files):
                raise ValueError(f"{STATE_FILE}: no sha256 of {missing[0]}")
            if max(state.best_step, state.validated_step, state.scored_step) > state.step:
                raise ValueError(f"{STATE_FILE}: names steps after its own step {state.step:,}")
            for name, sha256 in self._state.sha256.items():
                if sha256_of(folder / name) != sha256:
                    raise ValueError(f"sha256 of {name} is not the one that was saved")
        # Other OSErrors may be temporary and do not condemn the checkpoint.
        except (FileNotFoundError, NotADirectoryError, UnfitFileError, ValueError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.folder}: damaged checkpoint ({error}), expected it as it was saved; take another one"
        )

    def config(self) -> Config:
        """Return the run's config; raise UserError for keys of another version."""
        try:
            return toml.load(self.folder / CONFIG_FILE)
        except UserError as error:
            writer = self._state.captionscale
            if writer == __version__:
                raise
            raise UserError(
                f"{error}; captionscale {writer} wrote this checkpoint, and this is {__version__}: take the"
                " version that wrote it"
            ) from None

    def vocabulary(self) -> Vocabulary:
        """Return the run's vocabulary; raise UserError if it is damaged."""
        return vocab.load(self.folder / VOCAB_FILE)

    @property
    def sha256(self) -> str:
        """Hash of the weights that `captioner` loads."""
        return self._state.sha256.get(EMA_FILE, self._state.sha256[MODEL_FILE])

    def captioner(self) -> Captioner:
        """Return the captioner in evaluation mode; with averaged weights, if the run has them.

        Raises:
            UserError: Weights that do not fit the config, or are NaN or infinite.
        """
        weights = self.weights() | self.ema_weights()
        for name, tensor in weights.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"{self.folder}: weights of {name} are NaN or infinite, expected finite ones;"
                    " take another step by --checkpoint, or train with a lower train.lr"
                )
        captioner = Captioner(self.config().model, len(self.vocabulary()))
        captioner.load_state_dict(weights)
        return captioner.eval()

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What a resume may not change, as `make_fingerprint` gave it."""
        return self._state.fingerprint

    def weights(self) -> dict[str, Tensor]:
        """Return the weights; raise UserError if they are of another model than the config's."""
        return self._load(MODEL_FILE, self.shape_model.state_dict())

    def ema_weights(self) -> dict[str, Tensor]:
        """Return the moving average of the weights, empty if the run has none; otherwise as `weights`."""
        if EMA_FILE not in self._state.sha256:
            return {}
        weights = self.shape_model.state_dict()
        return self._load(
            EMA_FILE, {name: each for name, each in weights.items() if each.is_floating_point()}
        )

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer state; raise UserError if it does not fit the model."""
        try:
            found = safetensors_file.read_header(self.folder / OPTIMIZER_FILE)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        expected: dict[str, Tensor] = {}
        for name, parameter in self.shape_model.named_parameters():
            # Frozen parameters have none.
            if f"{name}/step" in found:
                expected |= {f"{name}/{key}": parameter for key in MOMENTS}
                expected[f"{name}/step"] = torch.empty((), device="meta")
        return self._load(OPTIMIZER_FILE, expected)

    def _load(self, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return safetensors_file.load(self.folder / name, expected)
        except (OSError, ValueError) as error:
            raise self._damaged(ValueError(f"{name}: {error}")) from None

    @cached_property
    def shape_model(self) -> Captioner:
        """The captioner whose shapes tensors must have; one that is built already may be assigned."""
        with torch.device("meta"):
            return Captioner(self.config().model, len(self.vocabulary()))


def find_latest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest whole checkpoint, None if there is none; `warn` gets a line for each skipped file.

    Raises:
        UserError: All checkpoints are damaged, or the newest whole one has another format.
    """
    for warning in unknown_file_warnings(run):
        warn(f"warning: {warning}")
    steps = checkpoint_steps(run)
    for step in reversed(steps):
        try:
            return _checkpoint(run, step)
        except CheckpointVersionError:
            # Resuming from an older one would discard this one.
            raise
        except UserError as error:
            warn(f"warning: skipped: {error}")
    if steps:
        raise UserError(
            f"{run}: every checkpoint is damaged; copy the run again, or train it into another --out"
        )
    return None


def resume(run: Path, fingerprint: Mapping[str, Any]) -> Checkpoint | None:
    """Return the checkpoint to resume a run from, None for a new run.

    Raises:
        UserError: Another experiment's run, or all its checkpoints are damaged.
    """
    remove_partial_checkpoints(run)
    saved = find_latest(run, say)
    if saved is not None:
        if conflicts := resume_conflicts(saved.fingerprint, fingerprint):
            raise UserError(
                f"{saved.folder}: cannot resume another experiment: {'; '.join(conflicts)};"
                " set these back, or take another --out"
            )
        say(f"{run}: resuming from step {saved.train_state.step:,}")
    return saved


def open_checkpoint(run: Path, which: str = "best") -> Checkpoint:
    """Return the `best` or `last` checkpoint of a run, or that of a step; or the one in the folder itself.

    Raises:
        UserError: No run, no such checkpoint, or a damaged one.
    """
    require_run(run)
    if (run / STATE_FILE).is_file():
        return Checkpoint(run)
    last = find_latest(run, say)
    if last is None:
        raise UserError(
            f"{run}: no checkpoint, so no run; expected the --out of captionscale train; correct the path, or"
            " wait until it has saved"
        )
    best, steps = last.train_state.best_step, checkpoint_steps(run)
    if which == "last" or (which == "best" and not best):
        return last
    if which != "best" and not (which.isdecimal() and len(which) <= 12):
        raise UserError(f"--checkpoint {which}: expected best, last, or a step: {steps}")
    step = best if which == "best" else int(which)
    if step not in steps:
        raise UserError(
            f"{run}: no checkpoint of step {step}; there are {steps}; take one of these, or --checkpoint last"
        )
    return _checkpoint(run, step)


def _checkpoint(run: Path, step: int) -> Checkpoint:
    saved = Checkpoint(checkpoint_folder(run, step))
    if saved.train_state.step != step:
        raise UserError(
            f"{saved.folder}: holds step {saved.train_state.step:,}, expected step {step:,} as in its name;"
            " rename it"
        )
    return saved
