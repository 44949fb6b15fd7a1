"""The planned run, and facts about it that several checks need."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from captionscale import vocab
from captionscale.config import Config
from captionscale.data.sampler import BatchSampler
from captionscale.data.shards import Split
from captionscale.data.storage import Storage, open_storage
from captionscale.errors import UserError
from captionscale.train.log_reader import read_metric
from captionscale.train.run_folder import VOCAB_FILE, checkpoint_folder, checkpoint_steps
from captionscale.train.setup import make_sampler, total_steps
from captionscale.vocab import Vocabulary

_SAMPLED = 2000
_TIMES = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


# Compared by identity, as measurements of it are cached.
@dataclass(frozen=True, eq=False)
class Plan:
    """A planned run."""

    settings: Config
    run: Path | None
    profile: Mapping[str, Any]
    """As `profiles.read_profile` returns it."""
    nodes: int
    processes_per_node: int
    time_limit_s: float
    """Of the job; infinity: unknown or unlimited."""
    in_job: bool
    """Whether the run will use this machine."""
    quick: bool

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def cpu(self) -> bool:
        """Whether the run uses CPUs only."""
        return bool(self.profile.get("use_cpu"))

    @cached_property
    def storage(self) -> Storage:
        """The shards' storage."""
        data = self.settings.data
        return open_storage(data.shards, data.cache, data.cache_gb)

    @cached_property
    def split(self) -> Split:
        """The training split."""
        return Split(self.storage, self.settings.data.train_split)

    @cached_property
    def sampler(self) -> BatchSampler:
        """The training sampler."""
        return make_sampler(self.split, self.settings)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.settings, self.sampler)

    @property
    def saved_step(self) -> int:
        """Step of the run's newest checkpoint; 0: none."""
        return max(checkpoint_steps(self.run), default=0) if self.run else 0

    def metric(self, key: str) -> list[float]:
        """Return a metric's values in the run's log."""
        return list(read_metric(self.run, key).values()) if self.run else []

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """That of the newest checkpoint, or one of about the same size, built from some images."""
        if self.run and self.saved_step:
            return vocab.load(checkpoint_folder(self.run, self.saved_step) / VOCAB_FILE)
        data = self.settings.data
        count = min(len(self.split), _SAMPLED)
        items = np.random.default_rng(0).choice(len(self.split), count, replace=False)
        captions = (caption for item in items.tolist() for caption in self.split.captions(item))
        return vocab.build(captions, data.min_count, data.max_vocab_size)


def parse_slurm_time(text: str) -> float:
    """Read a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on.

    Raises:
        UserError: It is not one.

    Examples:
        >>> [parse_slurm_time(text) for text in ("90", "1:30", "4:00:00", "1-0", "2-03:30")]
        [5400.0, 90.0, 14400.0, 86400.0, 185400.0]
    """
    found = _TIMES.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"--time {text}: not a time, expected one as SLURM writes it; pass one such as 4:00:00 or 2-00"
        )
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] or found[4]:
        return float(((days * 24 + first) * 60 + second) * 60 + third)
    return float(first * 60 + second)
