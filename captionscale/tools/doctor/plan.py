"""What is to be run and where, and what several checks need to know of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captionscale import vocab
from captionscale.config import Config
from captionscale.data.sampler import BatchSampler
from captionscale.data.shards import Split
from captionscale.data.storage import Storage, open_storage
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.train.run_folder import VOCAB_FILE, checkpoint_folder, checkpoint_steps
from captionscale.train.setup import make_sampler, total_steps
from captionscale.vocab import Vocabulary

_SAMPLED = 2000
_TIMES = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


# One is only itself: what was measured for it is kept.
@dataclass(frozen=True, eq=False)
class Plan:
    """A run to come."""

    settings: Config
    run: Path | None
    profile: Mapping[str, Any]
    """As `profiles.read_profile` gives it."""
    nodes: int
    processes_per_node: int
    """Processes on each node."""
    time_limit_s: float | None
    """Of the job's time; none: unknown, or unlimited."""
    in_job: bool
    """Whether this machine is one that the run will have."""
    quick: bool

    @property
    def world_size(self) -> int:
        """Of all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def cpu(self) -> bool:
        """Whether the run is one for CPUs."""
        return bool(self.profile.get("use_cpu"))

    @cached_property
    def storage(self) -> Storage:
        """Where the shards are."""
        data = self.settings.data
        return open_storage(data.shards, data.cache, data.cache_gb)

    @cached_property
    def split(self) -> Split:
        """To learn from."""
        return Split(self.storage, self.settings.data.train_split)

    @cached_property
    def sampler(self) -> BatchSampler:
        """In which it is learned from."""
        return make_sampler(self.split, self.settings)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return total_steps(self.settings, self.sampler)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The run's words, or about so many: of some images only, or of the run's newest checkpoint."""
        saved = checkpoint_steps(self.run) if self.run else []
        if self.run and saved:
            return vocab.load(checkpoint_folder(self.run, saved[-1]) / VOCAB_FILE)
        data = self.settings.data
        items = np.arange(len(self.split))
        if len(items) > _SAMPLED:
            items = np.random.default_rng(0).choice(items, _SAMPLED, replace=False)
        captions = (caption for item in items.tolist() for caption in self.split.captions(item))
        return vocab.build(captions, data.min_count, data.max_vocab_size)

    @cached_property
    def meta_captioner(self) -> Captioner:
        """The captioner, without any memory for its numbers."""
        with torch.device("meta"):
            return Captioner(self.settings.model, len(self.vocabulary))


def parse_slurm_time(text: str) -> float:
    """Read a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on.

    Raises:
        UserError: It is not one.

    Examples:
        >>> parse_slurm_time("90"), parse_slurm_time("1:30"), parse_slurm_time("4:00:00"), parse_slurm_time("1-0"), parse_slurm_time("2-03:30")
        (5400.0, 90.0, 14400.0, 86400.0, 185400.0)
    """
    found = _TIMES.fullmatch(text.strip())
    if found is None:
        raise UserError(f"--time {text}: not a time, wanted one as SLURM writes it; such as 4:00:00 or 2-00")
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1] is not None:
        return float(((days * 24 + first) * 60 + second) * 60 + third)
    if found[4] is not None:
        return float((first * 60 + second) * 60 + third)
    return float(first * 60 + second)
