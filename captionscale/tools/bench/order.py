"""`captionscale bench order`: what each rank reads in an epoch, and what it takes to know that."""

import time
import tracemalloc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

from captionscale.data.sampler import BatchSampler
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.progress import progress
from captionscale.tools.bench.race import Sheet

_MICRO_BATCH, _WINDOW, _STREAMS = 32, 4, 8
# A million shards of a thousand images would want the memory of a whole node, so the last ones are smaller.
_SPLITS = ((118, 1000), (1_000, 1000), (10_000, 1000), (100_000, 100), (1_000_000, 10))
_WORLDS = (1, 8, 64, 1024)


_COLUMNS = ("ranks", "shards", "images", "shards a rank opens", "w x its share of bytes", "s", "MB")


def bench(shards: str | None, split: str) -> list[Sheet]:
    """Measure what ranks read.

    Args:
        shards: Folder or URL of real ones; None: the second table only.
        split: Of these shards.

    Raises:
        UserError: No such shards, or too few images for eight micro-batches.
    """
    sheets = [_simulated()]
    if shards is not None:
        sheets.insert(0, _real(shards, split))
    sheets[-1].notes += [
        "A rank's share of the bytes, times the number of ranks: 1 is even. s and MB: to compute the order",
        "of an epoch, as each rank does once in it.",
    ]
    return sheets


def _real(shards: str, name: str) -> Sheet:
    """Return what 1, 2, 4 and 8 ranks read of packed shards in an epoch; bytes as the index has them."""
    split = Split(open_storage(shards), name)
    sizes = split.index["image_size"] + split.index["json_size"]
    counts = tuple(split.shard_sizes.tolist())
    # As many samples for a step as half a split has, where it is tiny.
    micro_batch = max(1, min(_MICRO_BATCH, len(split) // (2 * _STREAMS)))
    rows = [_row(counts, sizes, ranks, _STREAMS, micro_batch) for ranks in (1, 2, 4, 8)]
    return Sheet(f"{shards}, split {name}, eight micro-batches in a step", _COLUMNS, rows)


def _simulated() -> Sheet:
    """Return what 1 to 1,024 ranks read of 118 to 1,000,000 shards of images of one size."""
    rows = []
    with progress("orders", len(_SPLITS) * len(_WORLDS), transient=True) as bar:
        for shards, images in _SPLITS:
            sizes = np.ones(shards * images, np.int64)
            for ranks in _WORLDS:
                # A micro-batch for each rank, and no fewer than usual.
                rows.append(_row((images,) * shards, sizes, ranks, max(ranks, _STREAMS), _MICRO_BATCH))
                bar.advance()
    return Sheet("Simulated: images of one size, micro-batches of 32", _COLUMNS, rows)


def _row(
    counts: tuple[int, ...],
    sizes: Shaped[np.ndarray, "sample"],
    ranks: int,
    streams: int,
    micro_batch: int,
) -> Sequence[str | int | float]:
    began = time.perf_counter()
    _order(counts, streams, micro_batch).micro_batches(0, 0, ranks)
    seconds = time.perf_counter() - began
    # Again, as tracing takes time.
    tracemalloc.start()
    order = _order(counts, streams, micro_batch)
    order.micro_batches(0, 0, ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    opened, read = zip(*(_of_rank(order, rank, ranks, shard_of, sizes) for rank in range(ranks)), strict=True)
    low, high = (ranks * each(read) / int(sizes.sum()) for each in (min, max))
    return (
        f"{ranks:,}",
        len(counts),
        len(sizes),
        f"{min(opened):,} to {max(opened):,}",
        f"{low:.4f} to {high:.4f}",
        round(seconds, 3),
        round(peak / 1e6),
    )


def _order(counts: tuple[int, ...], streams: int, micro_batch: int) -> BatchSampler:
    return BatchSampler(counts, 0, streams * micro_batch, micro_batch, _WINDOW)


def _of_rank(
    order: BatchSampler,
    rank: int,
    ranks: int,
    shard_of: Int[np.ndarray, "sample"],
    sizes: Shaped[np.ndarray, "sample"],
) -> tuple[int, int]:
    """Return the shards that a rank opens, and the bytes that it reads."""
    steps = range(order.steps_per_epoch)
    shares = [items for step in steps for _, items in order.micro_batches(step, rank, ranks)]
    items = np.concatenate(shares)
    return len(np.unique(shard_of[items])), int(sizes[items].sum())
