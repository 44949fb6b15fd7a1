"""A checkpoint on disk, proven whole, as others read it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from captionscale import toml, vocab
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.files import sha256_of
from captionscale.model.captioner import Captioner
from captionscale.train.layout import AVERAGE, MODEL, OPTIMIZER, SETTINGS, STATE, VOCAB
from captionscale.train.standing import Standing
from captionscale.version import __version__
from captionscale.vocab import Vocabulary

FORMAT = 1


class OtherVersionError(UserError):
    """A checkpoint is whole, but written by a version whose format is another one."""


class Checkpoint:
    """A checkpoint on disk, proven whole."""

    def __init__(self, folder: Path):
        """Read a checkpoint's state and compare its files with their checksums.

        Raises:
            OtherVersionError: It is not of this format.
            UserError: A file is missing or damaged.
            OSError: One cannot be read.
        """
        self.folder = folder
        try:
            self._state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if self._state["format"] != FORMAT:
                raise OtherVersionError(
                    f"{folder}: a checkpoint of format {self._state['format']}, written by captionscale"
                    f" {self._state.get('captionscale', 'of another version')}; wanted format {FORMAT}, which"
                    f" captionscale {__version__} reads; take the version that wrote it, or another run"
                )
            for name, sha256 in self._state["sha256"].items():
                if sha256_of(folder / name) != sha256:
                    raise ValueError(f"sha256 of {name} is not the one that was saved")
        # Another OSError may pass, and is no reason to do without the checkpoint.
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: damaged checkpoint ({error}), wanted it as it was saved; take another one"
            ) from None

    @property
    def standing(self) -> Standing:
        """How far the run was."""
        return Standing(
            **{name: self._state[name] for name in Standing.__dataclass_fields__ if name in self._state}
        )

    def config(self) -> Config:
        """Return the run's settings.

        Raises:
            UserError: Another version had other keys.
        """
        try:
            return toml.load(self.folder / SETTINGS)
        except UserError as error:
            writer = self._state.get("captionscale", __version__)
            if writer == __version__:
                raise
            raise UserError(
                f"{error}; captionscale {writer} wrote this checkpoint, and this is {__version__}: take the"
                " version that wrote it"
            ) from None

    def vocabulary(self) -> Vocabulary:
        """Return the run's words."""
        return vocab.load(self.folder / VOCAB)

    @property
    def sha256(self) -> str:
        """Hash of the weights that the captioner has."""
        hashes: dict[str, str] = self._state["sha256"]
        return hashes.get(AVERAGE, hashes[MODEL])

    def captioner(self) -> Captioner:
        """Return the captioner as it was saved, or the average of what it was, in evaluation mode.

        Raises:
            UserError: A weight is no number, and so is all that would come of it.
        """
        tensors = self.weights() | self.average()
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"{self.folder}: weights of {name} are no numbers (NaN or infinite), wanted those of a"
                    " run that learned; take another step by --checkpoint, or train with a lower train.lr"
                )
        captioner = Captioner(self.config().model, len(self.vocabulary()))
        captioner.load_state_dict(tensors)
        return captioner.eval()

    def refuse_another(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse to go on with another experiment than this checkpoint's.

        Args:
            fingerprint: What the run that goes on would do.

        Raises:
            UserError: It would not be the same run; names what differs.
        """
        saved = self._state["fingerprint"]
        differing = [key for key in {**saved, **fingerprint} if saved.get(key) != fingerprint.get(key)]
        if differing:
            changes = "; ".join(
                f"{key} was {_short(saved.get(key))}, now {_short(fingerprint.get(key))}" for key in differing
            )
            raise UserError(
                f"{self.folder}: cannot go on with another experiment: {changes};"
                " set these back, or take another --out"
            )

    def weights(self) -> dict[str, Tensor]:
        """Return the captioner's weights."""
        return load_file(self.folder / MODEL)

    def average(self) -> dict[str, Tensor]:
        """Return the weights' moving average; nothing if the run has none."""
        return load_file(self.folder / AVERAGE) if AVERAGE in self._state["sha256"] else {}

    def memory(self) -> dict[str, Tensor]:
        """Return the optimiser's memory, as `Engine.load_memory` takes it."""
        return load_file(self.folder / OPTIMIZER)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else text[:12] + "...'"
