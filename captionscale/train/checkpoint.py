"""Checkpoints: their format, reading and finding them; one format for all engines and any number of ranks.

A run keeps them in `checkpoints/step-00012000/`: `model.safetensors`, `optimizer.safetensors`, with
`train.ema_decay` also `ema.safetensors`, `state.json` (step, fingerprint, best score, checksums),
`config.toml` and `vocab.json`. Nothing is pickled. Names of partial ones end in `.tmp`.
"""

from collections.abc import Callable, Iterable, Mapping
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
_NEEDED = {MODEL_FILE, CONFIG_FILE, VOCAB_FILE}
_KNOWN = _NEEDED | {OPTIMIZER_FILE, EMA_FILE}

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
            _refuse_other_files(self._state.sha256.keys())
            done = self.train_state
            if max(done.best_step, done.validated_step, done.scored_step) > done.step:
                raise ValueError(f"{STATE_FILE}: names steps after its own step {done.step:,}")
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

    def weights(self, captioner: Captioner | None = None) -> dict[str, Tensor]:
        """Return the model weights.

        Args:
            captioner: To load them into; default: one of the checkpoint's config.

        Raises:
            UserError: Weights of another model.
        """
        return self._load(MODEL_FILE, (captioner or self._own).state_dict())

    def ema_weights(self, captioner: Captioner | None = None) -> dict[str, Tensor]:
        """Return the moving average of the weights, empty if the run has none; otherwise as `weights`."""
        if EMA_FILE not in self._state.sha256:
            return {}
        weights = (captioner or self._own).state_dict()
        return self._load(
            EMA_FILE, {name: each for name, each in weights.items() if each.is_floating_point()}
        )

    def optimizer_state(self, captioner: Captioner) -> dict[str, Tensor]:
        """Return the optimizer state of a captioner; raise UserError if it does not fit."""
        try:
            found = safetensors_file.read_header(self.folder / OPTIMIZER_FILE)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        expected: dict[str, Tensor] = {}
        for name, parameter in captioner.named_parameters():
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
    def _own(self) -> Captioner:
        """A captioner without memory for its weights."""
        with torch.device("meta"):
            return Captioner(self.config().model, len(self.vocabulary()))


def _refuse_other_files(names: Iterable[str]) -> None:
    """Refuse checksums of other files than a checkpoint's, so that no other path is ever opened."""
    if odd := sorted(set(names) - _KNOWN):
        raise ValueError(f"{STATE_FILE}: sha256 of {odd[0]!r:.80}, which no checkpoint holds")
    if missing := sorted(_NEEDED - set(names)):
        raise ValueError(f"{STATE_FILE}: no sha256 of {missing[0]}")


def find_latest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest whole checkpoint, None if there is none; `warn` gets a line for whatever is skipped.

    Raises:
        UserError: All checkpoints are damaged, or the newest whole one has another format.
    """
    for warning in unknown_file_warnings(run):
        warn(f"warning: {warning}")
    for step in reversed(checkpoint_steps(run)):
        try:
            return _checkpoint(run, step)
        except CheckpointVersionError:
            # Resuming from an older one would discard this one.
            raise
        except UserError as error:
            warn(f"warning: passed over: {error}")
    if checkpoint_steps(run):
        raise UserError(
            f"{run}: every checkpoint is damaged; copy the run again, or train it into another --out"
        )
    return None


def resume(run: Path, fingerprint: Mapping[str, Any], tell: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint to resume a run from, None for a new run; `tell` gets lines for the user.

    Raises:
        UserError: Another experiment's run, or all its checkpoints are damaged.
    """
    remove_partial_checkpoints(run)
    saved = find_latest(run, tell)
    if saved is not None:
        if conflicts := resume_conflicts(saved.fingerprint, fingerprint):
            raise UserError(
                f"{saved.folder}: cannot resume another experiment: {'; '.join(conflicts)};"
                " set these back, or take another --out"
            )
        tell(f"{run}: resuming from step {saved.train_state.step:,}")
    return saved


def open_checkpoint(run: Path, which: str = "best") -> Checkpoint:
    """Return a checkpoint of a run.

    Args:
        run: The run's folder, or a checkpoint's, such as `export --format hub` writes.
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
            f"{run}: no checkpoint, so no run; expected the --out of captionscale train; correct the path, or"
            " wait until it has saved"
        )
    if which == "last" or (which == "best" and not last.train_state.best_step):
        return last
    if which == "best":
        step = last.train_state.best_step
    elif which.isdecimal() and len(which) <= 12:
        step = int(which)
    else:
        raise UserError(f"--checkpoint {which}: expected best, last, or a step: {checkpoint_steps(run)}")
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
