"""The order of samples: which samples each optimizer step reads, for any number of ranks.

A global batch is a fixed number of micro-batches. Micro-batch m reads stream m, the m-th equal part of the
epoch's shuffled shards, so a rank opens only the shards of its own streams: rank r of w runs micro-batches r,
r + w, r + 2w, ...
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Int, Shaped

from captionscale.errors import UserError


# Compared by identity, for `lru_cache`: hashing a million shard sizes takes 10 ms.
@dataclass(frozen=True, eq=False)
class BatchSampler:
    """The order of a split's samples over all epochs.

    Args:
        shard_sizes: Samples in each shard; items are numbered across shards.
        seed: The experiment's seed.
        global_batch: Samples per step.
        micro_batch: Maximum samples per micro-batch.
        shuffle_window: Samples are shuffled within this many neighboring shards of a stream.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    global_batch: int
    micro_batch: int
    shuffle_window: int

    def __post_init__(self) -> None:
        if sum(self.shard_sizes) // self.micro_batches_per_step < self.steps_per_epoch:
            raise UserError(
                f"train split: {sum(self.shard_sizes):,} samples cannot give each of"
                f" {self.micro_batches_per_step} micro-batches at least one sample in each of"
                f" {self.steps_per_epoch} steps of an epoch; lower train.global_batch or raise"
                " train.micro_batch"
            )

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches per step, over all ranks."""
        return self.global_batch // self.micro_batch

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; each sample is read exactly once."""
        longest_stream = -(-sum(self.shard_sizes) // self.micro_batches_per_step)
        return -(-longest_stream // self.micro_batch)

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, counted from 0."""
        return step // self.steps_per_epoch

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[tuple[int, Int[np.ndarray, "_"]]]:
        """Return one rank's micro-batches of a step: numbers and items.

        Streams are cut into nearly equal parts, so that batches of an epoch have nearly equal size.

        Raises:
            UserError: More ranks than micro-batches.
        """
        if self.micro_batches_per_step < world_size:
            raise UserError(
                f"train.global_batch = {self.global_batch} holds {self.micro_batches_per_step} micro-batches"
                f" of train.micro_batch = {self.micro_batch}, expected one for each of {world_size}"
                " processes; lower train.micro_batch or start fewer processes"
            )
        streams = _streams(self, self.epoch(step))
        part = step % self.steps_per_epoch
        numbers = range(rank, self.micro_batches_per_step, world_size)
        return [(number, _part(streams[number], part, self.steps_per_epoch)) for number in numbers]


# Two epochs: the loader prefetches across the boundary.
@lru_cache(maxsize=2)
def _streams(sampler: BatchSampler, epoch: int) -> list[Int[np.ndarray, "_"]]:
    """Return the items of each stream of an epoch, in reading order."""
    random = np.random.default_rng([sampler.seed, epoch])
    sizes = np.array(sampler.shard_sizes)
    first = np.cumsum(sizes) - sizes
    shuffled = random.permutation(len(sizes))
    # Items of the shuffled shards: position plus the offset of each shard's first item.
    offset = first[shuffled] - (np.cumsum(sizes[shuffled]) - sizes[shuffled])
    sequence = np.arange(sizes.sum()) + np.repeat(offset, sizes[shuffled])
    shard_rank = np.repeat(np.arange(len(sizes)), sizes[shuffled])
    priority = random.random(len(sequence))
    streams, count = [], sampler.micro_batches_per_step
    for number in range(count):
        items, ranks, priorities = (_part(each, number, count) for each in (sequence, shard_rank, priority))
        window = (ranks - ranks[:1]) // sampler.shuffle_window
        streams.append(items[np.lexsort((priorities, window))])
    return streams


def _part(array: Shaped[np.ndarray, "item"], part: int, parts: int) -> Shaped[np.ndarray, "_"]:
    return array[len(array) * part // parts : len(array) * (part + 1) // parts]
