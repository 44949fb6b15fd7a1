"""A checkpoint on disk, proven whole, as others read it."""

from collections.abc import Iterable, Mapping
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
from captionscale.train.run_folder import (
    CONFIG_FILE,
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    VOCAB_FILE,
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
_STANDING = msgspec.json.Decoder(TrainState)


class CheckpointVersionError(UserError):
    """A checkpoint is whole, but written by a version whose format is another one."""


class Checkpoint:
    """A checkpoint on disk, proven whole."""

    def __init__(self, folder: Path):
        """Read a checkpoint's state and compare its files with their checksums.

        Raises:
            CheckpointVersionError: It is not of this format.
            UserError: A file is missing or damaged.
            OSError: One cannot be read.
        """
        self.folder = folder
        try:
            data = read_file(folder / STATE_FILE)
            version = parsing.decode(data, _VERSION)
            if version.format != FORMAT:
                raise CheckpointVersionError(
                    f"{folder}: a checkpoint of format {version.format}, written by captionscale"
                    f" {version.captionscale}; wanted format {FORMAT}, which"
                    f" captionscale {__version__} reads; take the version that wrote it, or another run"
                )
            self._state = parsing.decode(data, _STATE)
            self.train_state = parsing.decode(data, _STANDING)
            """How far the run was."""
            _refuse_other_files(self._state.sha256.keys())
            done = self.train_state
            if max(done.best_step, done.validated_step, done.scored_step) > done.step:
                raise ValueError(f"{STATE_FILE}: speaks of steps after its own step {done.step:,}")
            for name, sha256 in self._state.sha256.items():
                if sha256_of(folder / name) != sha256:
                    raise ValueError(f"sha256 of {name} is not the one that was saved")
        # Another OSError may pass, and is no reason to do without the checkpoint.
        except (FileNotFoundError, NotADirectoryError, UnfitFileError, ValueError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.folder}: damaged checkpoint ({error}), wanted it as it was saved; take another one"
        )

    def config(self) -> Config:
        """Return the run's settings.

        Raises:
            UserError: Another version had other keys.
        """
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
        """Return the run's words.

        Raises:
            UserError: They are damaged.
        """
        return vocab.load(self.folder / VOCAB_FILE)

    @property
    def sha256(self) -> str:
        """Hash of the weights that the captioner has."""
        return self._state.sha256.get(EMA_FILE, self._state.sha256[MODEL_FILE])

    def captioner(self) -> Captioner:
        """Return the captioner as it was saved, or the average of what it was, in evaluation mode.

        Raises:
            UserError: The weights are not the config's, or a weight is no number, and so is all that would
                come of it.
        """
        weights = self.weights() | self.ema_weights()
        for name, tensor in weights.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"{self.folder}: weights of {name} are no numbers (NaN or infinite), wanted those of a"
                    " run that learned; take another step by --checkpoint, or train with a lower train.lr"
                )
        captioner = Captioner(self.config().model, len(self.vocabulary()))
        captioner.load_state_dict(weights)
        return captioner.eval()

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What a resume may not change, as `make_fingerprint` gave it."""
        return self._state.fingerprint

    def weights(self, captioner: Captioner | None = None) -> dict[str, Tensor]:
        """Return the captioner's weights.

        Args:
            captioner: That they are for; without it, that of the checkpoint's own config.

        Raises:
            UserError: They are another captioner's.
        """
        return self._load(MODEL_FILE, (captioner or self._own).state_dict())

    def ema_weights(self, captioner: Captioner | None = None) -> dict[str, Tensor]:
        """Return the weights' moving average; nothing if the run has none. Otherwise as `weights`."""
        if EMA_FILE not in self._state.sha256:
            return {}
        weights = (captioner or self._own).state_dict()
        return self._load(
            EMA_FILE, {name: each for name, each in weights.items() if each.is_floating_point()}
        )

    def optimizer_state(self, captioner: Captioner) -> dict[str, Tensor]:
        """Return the optimiser's memory of a captioner, as `Engine.load_optimizer_state` takes it.

        Raises:
            UserError: It is that of another captioner.
        """
        try:
            found = safetensors_file.read_header(self.folder / OPTIMIZER_FILE)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        expected: dict[str, Tensor] = {}
        for name, parameter in captioner.named_parameters():
            # There is none of what has not learned yet.
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
        """The captioner that the config says, which takes no memory."""
        with torch.device("meta"):
            return Captioner(self.config().model, len(self.vocabulary()))


def _refuse_other_files(names: Iterable[str]) -> None:
    """Refuse checksums of anything but a checkpoint's own files: no other path is ever opened."""
    if odd := sorted(set(names) - _KNOWN):
        raise ValueError(f"{STATE_FILE}: sha256 of {odd[0]!r:.80}, which no checkpoint holds")
    if missing := sorted(_NEEDED - set(names)):
        raise ValueError(f"{STATE_FILE}: no sha256 of {missing[0]}")
