"""Statistics of a data set's shards, as a table and as a figure."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from rich.filesize import decimal

from captionscale.config import Data
from captionscale.data import manifest
from captionscale.data.shards import Split
from captionscale.data.storage import Storage, as_storage, read_manifest
from captionscale.errors import UserError
from captionscale.files import atomic_write
from captionscale.progress import SHORT_S, progress, say
from captionscale.vocab import split_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_WORDS: int = Data.model_fields["max_words"].default
_IMAGE_SIZE: int = Data.model_fields["image_size"].default
_MANY_SMALL = 0.1
_SHOWN_WORDS = 8
_SHOWN_IMAGES = 3

_ENDINGS = (".png", ".pdf", ".svg")
# Okabe and Ito, "Color Universal Design", 2008, without yellow, which is illegible on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINES = ("-", "--", ":", "-.")
_GUIDE: dict[str, Any] = {"color": "0.4", "linewidth": 1, "linestyle": (0, (1, 1))}


@dataclass(frozen=True)
class _Counted:
    """A split, the number of words of each caption, and the count of each word."""

    split: Split
    lengths: Int[np.ndarray, "caption"]
    words: Counter[str]


@dataclass(frozen=True)
class _Vocabulary:
    """The vocabulary that training would build from a split."""

    source: str
    """Name of the split."""
    ranked: list[tuple[str, int]]
    """Its words and their counts, most frequent first."""
    min_count: int
    kept: int
    """Words that occur at least `min_count` times."""

    def coverage(self, words: Counter[str]) -> Float[np.ndarray, "rank"]:
        """Return the fraction of `words` among the first 0, 1, 2, ... ranked words."""
        return np.cumsum([0, *(words[word] for word, _ in self.ranked)]) / words.total()


def print_stats(where: Storage | Path, *, min_count: int, plot: Path | None = None) -> None:
    """Print statistics of shards, and draw them.

    The vocabulary is that of the split `train`, or else of the first one that has words.

    Args:
        where: What `captionscale pack` wrote.
        min_count: Least count of a word of the vocabulary.
        plot: PNG, PDF or SVG file for the figure, if any.

    Raises:
        UserError: No finished shards, damaged ones, or a figure of unknown format or in no writable place.
    """
    if plot is not None and plot.suffix.lower() not in _ENDINGS:
        raise UserError(f"{plot}: ends in '{plot.suffix}', expected {' or '.join(_ENDINGS)}; rename it")
    place = as_storage(where)
    found = read_manifest(place)
    if not found.splits:
        raise UserError(f"{place}/{manifest.MANIFEST}: no splits, expected at least one; {manifest.CURE}")
    counted = [_count(Split(place, name)) for name in found.splits]
    # The split of the vocabulary comes first.
    worded = sorted((each for each in counted if each.words), key=lambda each: each.split.name != "train")
    vocabulary = _vocabulary(worded[0], min_count) if worded else None
    print(f"{place}: images stored as: {found.images}\n\n{_table(counted, vocabulary)}\n")
    for line in _remarks(counted, worded, vocabulary):
        print(line)
    if plot is not None:
        _draw(counted, worded, vocabulary, plot)
        say(f"drawn: {plot}")


def _count(split: Split) -> _Counted:
    lengths: list[int] = []
    words: Counter[str] = Counter()
    captioned = np.flatnonzero(split.index["captions"])
    for item in _watched(captioned.tolist(), f"reading {split.name}"):
        for caption in split.captions(item):
            found = split_words(caption)
            lengths.append(len(found))
            words.update(found)
    return _Counted(split, np.array(lengths, np.int64), words)


def _watched(items: Sequence[int], title: str) -> Iterator[int]:
    """Yield items, with a progress bar once it takes long."""
    started, done = time.monotonic(), 0
    while done < len(items) and time.monotonic() - started < SHORT_S:
        yield items[done]
        done += 1
    if done < len(items):
        with progress(title, len(items), done, transient=True) as bar:
            for item in items[done:]:
                yield item
                bar.advance()


def _vocabulary(counted: _Counted, min_count: int) -> _Vocabulary:
    ranked = counted.words.most_common()
    return _Vocabulary(counted.split.name, ranked, min_count, sum(count >= min_count for _, count in ranked))


def _table(counted: Sequence[_Counted], vocabulary: _Vocabulary | None) -> str:
    """Return a line for each statistic, with a column for each split."""
    columns = [_column(each, vocabulary) for each in counted]
    # Statistics of captioned splits only come last, so all columns have one order.
    labels = list(dict.fromkeys(label for column in columns for label in column))
    cells = [["", *labels]]
    for each, column in zip(counted, columns, strict=True):
        cells.append([each.split.name, *(column.get(label, "-") for label in labels)])
    widths = [max(map(len, column)) for column in cells]
    return "\n".join(
        "   ".join([label.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])
        for label, *numbers in zip(*cells, strict=True)
    )


def _column(counted: _Counted, vocabulary: _Vocabulary | None) -> dict[str, str]:
    facts, index, lengths = counted.split.info, counted.split.index, counted.lengths
    width, height, captions = index["width"], index["height"], index["captions"]
    shapes = (width < height, width > height, width == height)
    column = {
        "images": f"{facts.images:,}",
        "rejected": f"{facts.rejected:,}",
        "shards": f"{len(facts.shards):,}",
        "size": decimal(sum(shard.size_bytes for shard in facts.shards)),
        "width: min / median / max": f"{width.min()} / {np.median(width):g} / {width.max()}",
        "height: min / median / max": f"{height.min()} / {np.median(height):g} / {height.max()}",
        "portrait / landscape / square": " / ".join(f"{shape.mean():.0%}" for shape in shapes),
        f"shorter side below {_IMAGE_SIZE}": f"{_small(counted.split):.1%}",
        "captions": f"{facts.captions:,}",
        "of an image: min / mean / max": f"{captions.min()} / {captions.mean():.2f} / {captions.max()}",
    }
    if len(lengths):
        most = np.percentile(lengths, 95, method="inverted_cdf")
        column |= {
            "words of a caption: mean": f"{lengths.mean():.2f}",
            "median / 95 % / max": f"{np.median(lengths):g} / {most} / {lengths.max()}",
            f"captions above {_MAX_WORDS} words": f"{(lengths > _MAX_WORDS).mean():.1%}",
        }
    if vocabulary is not None and counted.words:
        column["words in the vocabulary"] = f"{vocabulary.coverage(counted.words)[vocabulary.kept]:.1%}"
    return column


def _short_sides(split: Split) -> Int[np.ndarray, "sample"]:
    sides: Int[np.ndarray, "sample"] = np.minimum(split.index["width"], split.index["height"])
    return sides


def _small(split: Split) -> float:
    return float((_short_sides(split) < _IMAGE_SIZE).mean())


def _remarks(
    counted: Sequence[_Counted], worded: Sequence[_Counted], vocabulary: _Vocabulary | None
) -> Iterator[str]:
    """Yield unknown words, smallest images, and notes."""
    if vocabulary is not None:
        yield (
            f"vocabulary of {vocabulary.source}: {len(vocabulary.ranked):,} words,"
            f" {vocabulary.kept:,} of them at least {vocabulary.min_count:,} times"
        )
        known = {word for word, _ in vocabulary.ranked[: vocabulary.kept]}
        for each in worded[1:]:
            unknown = Counter({word: count for word, count in each.words.items() if word not in known})
            shown = ", ".join(f"{word:.40} {count:,}" for word, count in unknown.most_common(_SHOWN_WORDS))
            yield f"unknown words of {each.split.name}: {shown or 'none'}"
    for each in counted:
        smallest = each.split.index[np.argsort(_short_sides(each.split), kind="stable")[:_SHOWN_IMAGES]]
        shown = ", ".join(f"{row['width']} x {row['height']} (image {row['image_id']})" for row in smallest)
        yield f"smallest images of {each.split.name}: {shown}"
    uncaptioned = [each.split.name for each in counted if not each.split.info.captions]
    if uncaptioned:
        yield (
            f"note: no captions in {', '.join(uncaptioned)}: these splits can be captioned, but not used for"
            " training or scoring"
        )
    small = [each.split.name for each in counted if _small(each.split) > _MANY_SMALL]
    if small:
        yield (
            f"note: many images of {', '.join(small)} have a side below {_IMAGE_SIZE} pixels, the default of"
            " data.image_size; they will be enlarged"
        )


def _draw(
    counted: Sequence[_Counted], worded: Sequence[_Counted], vocabulary: _Vocabulary | None, path: Path
) -> None:
    # A notebook sets this for its children, in which its backend cannot be imported.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure

    side = 1 if vocabulary is None else 2
    figure = Figure(figsize=(5 * side, 4 * side), dpi=200, layout="constrained")
    panels = list(figure.subplots(side, side, squeeze=False).flat)
    for panel in panels:
        # Seven colors and four line styles: 28 splits before two look the same.
        panel.set_prop_cycle(color=_COLORS * len(_LINES), linestyle=_LINES * len(_COLORS))
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
    _draw_sizes(panels[-1], counted)
    if vocabulary is not None:
        _draw_lengths(panels[0], worded)
        _draw_ranks(panels[1], vocabulary)
        _draw_coverage(panels[2], worded, vocabulary)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())


def _draw_lengths(axes: "Axes", worded: Sequence[_Counted]) -> None:
    for each in worded:
        # One more length, so that the line reaches zero.
        counts = np.bincount(each.lengths, minlength=each.lengths.max() + 2)
        axes.plot(100 * counts / len(each.lengths), label=each.split.name)
    axes.axvline(_MAX_WORDS, label=f"data.max_words = {_MAX_WORDS}", **_GUIDE)
    # A few very long captions would squeeze all others into a corner.
    most = max(float(np.percentile(each.lengths, 99)) for each in worded)
    axes.margins(y=0.3)
    axes.set(xlim=(0, 1.3 * max(most, _MAX_WORDS)), ylim=(0, None))
    axes.locator_params(axis="x", integer=True)
    axes.set(title="Caption length", xlabel="words", ylabel="% of the split's captions")
    axes.legend(loc="upper right", fontsize="small")


def _draw_ranks(axes: "Axes", vocabulary: _Vocabulary) -> None:
    counts = [count for _, count in vocabulary.ranked]
    axes.loglog(range(1, len(counts) + 1), counts, label=f"words of {vocabulary.source}")
    kept = f"{vocabulary.min_count:,} times: {vocabulary.kept:,} of {len(counts):,} words"
    axes.axhline(vocabulary.min_count, label=kept, **_GUIDE)
    axes.set(title="Word frequency", xlabel="rank of the word", ylabel="times in the captions")
    axes.legend(loc="upper right", fontsize="small")


def _draw_coverage(axes: "Axes", worded: Sequence[_Counted], vocabulary: _Vocabulary) -> None:
    for each in worded:
        axes.semilogx(100 * vocabulary.coverage(each.words), label=each.split.name)
    axes.axvline(vocabulary.kept, label=f"{vocabulary.kept:,} words", **_GUIDE)
    axes.set(xlim=(1, 1.1 * len(vocabulary.ranked)), ylim=(0, 102))
    axes.set(title=f"Coverage by the words of {vocabulary.source}")
    axes.set(xlabel="words in the vocabulary, most frequent first", ylabel="% of the split's caption words")
    axes.legend(loc="lower right", fontsize="small")


def _draw_sizes(axes: "Axes", counted: Sequence[_Counted]) -> None:
    indices = [each.split.index for each in counted]
    both = np.concatenate([np.stack([index["width"], index["height"]]) for index in indices], axis=1)
    (widths, heights), images = np.unique(both, axis=1, return_counts=True)
    # Rasterized in vector files too, which would otherwise hold a hundred thousand dots.
    areas = 4 + 400 * images / images.sum()
    axes.scatter(widths, heights, s=areas, alpha=0.5, linewidths=0, rasterized=True)
    low, high = min(both.min(), _IMAGE_SIZE) / 2, max(both.max(), _IMAGE_SIZE) * 2
    axes.plot([low, high], [low, high], label="square", **_GUIDE)
    corner = [_IMAGE_SIZE, _IMAGE_SIZE, high]
    axes.plot(corner, corner[::-1], label=f"data.image_size = {_IMAGE_SIZE}", **(_GUIDE | {"linestyle": "-"}))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(
        title="Image sizes (area of a dot: share of images)",
        xlabel="width in pixels",
        ylabel="height in pixels",
    )
    axes.legend(loc="lower right", fontsize="small")
