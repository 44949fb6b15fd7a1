"""Runs that caption images together: one, or several as an ensemble."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captionscale import toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.encoders.encoder import interpolation_of
from captionscale.model.search.ensemble import Ensemble
from captionscale.train.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class CheckpointEnsemble:
    """Checkpoints that caption together, and their common settings."""

    runs: tuple[Path, ...]
    checkpoints: tuple[Checkpoint, ...]
    config: Config
    """The first run's, with the requested overrides of the section `search`."""

    def captioner(self) -> Captioner | Ensemble:
        """Return the saved captioner, or the ensemble of all, in evaluation mode."""
        captioners = [saved.captioner() for saved in self.checkpoints]
        return captioners[0] if len(captioners) == 1 else Ensemble(captioners).eval()

    @property
    def sha256(self) -> str:
        """Hash of the weights, or of the members' hashes."""
        hashes = [saved.sha256 for saved in self.checkpoints]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def search_label(self) -> str:
        """Part of a result's name: search method, beam width, and a hash of all other search settings."""
        search = self.config.search
        how = f"beam{search.beam}" if search.method == "beam" else search.method
        searches = [
            config.search.model_dump(mode="json", exclude={"beam"})
            for config in (self.checkpoints[0].config(), self.config)
        ]
        if len(self.checkpoints) == 1 and searches[0] == searches[1]:
            return how
        made = json.dumps([searches[1], self.sha256], sort_keys=True)
        return f"{how}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"

    def provenance(self) -> dict[str, Any]:
        """Return what a receipt records about an ensemble; of a single run it records the same anyway."""
        if len(self.checkpoints) == 1:
            return {}
        return {
            "members": [
                {"run": run.resolve().name, "step": saved.train_state.step, "model": saved.sha256}
                for run, saved in zip(self.runs, self.checkpoints, strict=True)
            ]
        }


def _shared_settings(config: Config) -> dict[str, Any]:
    """Return what members share besides the vocabulary."""
    return {
        "data.image_size": config.data.image_size,
        "data.max_words": config.data.max_words,
        "encoder's interpolation": interpolation_of(config.model),
    }


def open_ensemble(
    run: Path, others: Sequence[Path], *, checkpoint: str, overrides: Sequence[str]
) -> CheckpointEnsemble:
    """Open the runs that caption together.

    Args:
        run: The --out of captionscale train.
        others: More runs, for an ensemble.
        checkpoint: `best`, `last` or a step, of each.
        overrides: `search.key=value` each, replacing the first run's own.

    Raises:
        UserError: No run or checkpoint, invalid settings, or runs that cannot caption together.
    """
    saved = [open_checkpoint(each, checkpoint) for each in (run, *others)]
    first, *rest = saved
    vocabulary, settings = first.vocabulary(), _shared_settings(first.config())
    for other, member in zip(others, rest, strict=True):
        theirs = member.vocabulary()
        if theirs.sha256 != vocabulary.sha256:
            raise UserError(
                f"--ensemble {other}: its vocabulary has {len(theirs):,} words (sha256"
                f" {theirs.sha256[:8]}...), that of {run} {len(vocabulary):,}"
                f" ({vocabulary.sha256[:8]}...), expected the same; leave it out, or train both"
                " with the same shards, data.min_count and data.max_vocab_size"
            )
        for key, value in _shared_settings(member.config()).items():
            if value != settings[key]:
                raise UserError(
                    f"--ensemble {other}: its {key} is {value}, that of {run} {settings[key]}, expected the"
                    " same; leave it out, or train both alike"
                )
    return CheckpointEnsemble(
        (run, *others), tuple(saved), toml.override(first.config(), overrides, "search")
    )
