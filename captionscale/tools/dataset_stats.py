"""Statistics of a data set's shards, as a table, as JSON and as a figure."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from rich.filesize import decimal

from captionscale.config import Data
from captionscale.data import manifest
from captionscale.data.shards import Split
from captionscale.data.storage import Storage, as_storage, read_manifest
from captionscale.errors import UserError
from captionscale.files import atomic_write
from captionscale.progress import progress, say
from captionscale.vocab import split_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_WORDS: int = Data.model_fields["max_words"].default
_IMAGE_SIZE: int = Data.model_fields["image_size"].default
_MANY_SMALL = 0.1
_SHOWN_WORDS = 8
_SHOWN_IMAGES = 3

_ROWS = {
    "images": "{images:,}",
    "rejected": "{rejected:,}",
    "shards": "{shards:,}",
    "size": "{size}",
    "width: min / median / max": "{width[min]} / {width[median]:g} / {width[max]}",
    "height: min / median / max": "{height[min]} / {height[median]:g} / {height[max]}",
    "portrait / landscape / square": "{portrait:.0%} / {landscape:.0%} / {square:.0%}",
    f"shorter side below {_IMAGE_SIZE}": "{below_image_size:.1%}",
    "captions": "{captions:,}",
    "of an image: min / mean / max": (
        "{image_captions[min]} / {image_captions[mean]:.2f} / {image_captions[max]}"
    ),
    "words of a caption: mean": "{caption_words[mean]:.2f}",
    "median / 95 % / max": "{caption_words[median]:g} / {caption_words[p95]} / {caption_words[max]}",
    f"captions above {_MAX_WORDS} words": "{above_max_words:.1%}",
    "words in the vocabulary": "{vocabulary_coverage:.1%}",
}
"""Labels and formats of the table; what a split does not have is a dash."""

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


def print_stats(
    where: Storage | Path, *, min_count: int, plot: Path | None = None, as_json: bool = False
) -> None:
    """Print statistics of shards, and draw them.

    The vocabulary is that of the split `train`, or else of the first one that has words.

    Args:
        where: What `captionscale pack` wrote.
        min_count: Least count of a word of the vocabulary.
        plot: PNG, PDF or SVG file for the figure, if any.
        as_json: Print JSON.

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
    ranked = worded[0].words.most_common() if worded else []
    known = {word for word, count in ranked if count >= min_count}
    vocabulary = {"split": worded[0].split.name, "words": len(ranked), "kept": len(known)} if worded else None
    stats = {each.split.name: _statistics(each, known) for each in counted}
    if as_json:
        tree = {"shards": str(place), "stored": str(found.images), "splits": stats, "vocabulary": vocabulary}
        print(json.dumps(tree, indent=1))
    else:
        print(f"{place}: images stored as: {found.images}\n\n{_table(stats)}\n")
        if vocabulary:
            print(
                f"vocabulary of {worded[0].split.name}: {len(ranked):,} words, {len(known):,} of them at"
                f" least {min_count:,} times"
            )
        for line in _remarks(stats, [each.split.name for each in worded[1:]]):
            print(line)
    if plot is not None:
        _draw(counted, worded, ranked, min_count, plot)
        say(f"drawn: {plot}")


def _count(split: Split) -> _Counted:
    lengths: list[int] = []
    words: Counter[str] = Counter()
    captioned = np.flatnonzero(split.index["captions"]).tolist()
    with progress(f"reading {split.name}", len(captioned), transient=True) as bar:
        for item in captioned:
            for caption in split.captions(item):
                found = split_words(caption)
                lengths.append(len(found))
                words.update(found)
            bar.advance()
    return _Counted(split, np.array(lengths, np.int64), words)


def _statistics(counted: _Counted, known: set[str]) -> dict[str, Any]:
    info, index, lengths = counted.split.info, counted.split.index, counted.lengths
    width, height, captions = index["width"], index["height"], index["captions"]
    sides = np.minimum(width, height)
    smallest = index[np.argsort(sides, kind="stable")[:_SHOWN_IMAGES]]
    stats: dict[str, Any] = {
        "images": info.images,
        "rejected": info.rejected,
        "shards": len(info.shards),
        "size_bytes": sum(shard.size_bytes for shard in info.shards),
        "width": _spread(width),
        "height": _spread(height),
        "portrait": float((width < height).mean()),
        "landscape": float((width > height).mean()),
        "square": float((width == height).mean()),
        "below_image_size": float((sides < _IMAGE_SIZE).mean()),
        "smallest_images": [
            {name: int(row[name]) for name in ("image_id", "width", "height")} for row in smallest
        ],
        "captions": info.captions,
        "image_captions": _spread(captions),
    }
    if len(lengths):
        stats["caption_words"] = _spread(lengths)
        stats["above_max_words"] = float((lengths > _MAX_WORDS).mean())
    if counted.words:
        unknown = Counter({word: count for word, count in counted.words.items() if word not in known})
        stats["vocabulary_coverage"] = 1 - unknown.total() / counted.words.total()
        stats["unknown_words"] = dict(unknown.most_common(_SHOWN_WORDS))
    return stats


def _spread(values: Int[np.ndarray, "value"]) -> dict[str, int | float]:
    return {
        "min": int(values.min()),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": int(np.percentile(values, 95, method="inverted_cdf")),
        "max": int(values.max()),
    }


def _table(stats: dict[str, dict[str, Any]]) -> str:
    """Return a line for each statistic, with a column for each split."""
    rows = [["", *stats]]
    for label, form in _ROWS.items():
        cells = [label]
        for split in stats.values():
            try:
                cells.append(form.format(size=decimal(split["size_bytes"]), **split))
            except KeyError:
                cells.append("-")
        rows += [cells] if set(cells[1:]) != {"-"} else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   ".join([label.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for label, *cells in rows
    )


def _remarks(stats: dict[str, dict[str, Any]], worded: Sequence[str]) -> Iterator[str]:
    """Yield unknown words of splits, smallest images, and notes."""
    for name in worded:
        shown = ", ".join(f"{word:.40} {count:,}" for word, count in stats[name]["unknown_words"].items())
        yield f"unknown words of {name}: {shown or 'none'}"
    for name, split in stats.items():
        sizes = (
            f"{it['width']} x {it['height']} (image {it['image_id']})" for it in split["smallest_images"]
        )
        yield f"smallest images of {name}: {', '.join(sizes)}"
    if uncaptioned := [name for name, split in stats.items() if not split["captions"]]:
        yield (
            f"note: no captions in {', '.join(uncaptioned)}: these splits can be captioned, but not used for"
            " training or scoring"
        )
    if small := [name for name, split in stats.items() if split["below_image_size"] > _MANY_SMALL]:
        yield (
            f"note: many images of {', '.join(small)} have a side below {_IMAGE_SIZE} pixels, the default of"
            " data.image_size; they will be enlarged"
        )


def _draw(
    counted: Sequence[_Counted],
    worded: Sequence[_Counted],
    ranked: Sequence[tuple[str, int]],
    min_count: int,
    path: Path,
) -> None:
    # A notebook sets this for its children, in which its backend cannot be imported.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure

    side = 2 if worded else 1
    figure = Figure(figsize=(5 * side, 4 * side), dpi=200, layout="constrained")
    panels = list(figure.subplots(side, side, squeeze=False).flat)
    for panel in panels:
        # Seven colors and four line styles: 28 splits before two look the same.
        panel.set_prop_cycle(color=_COLORS * len(_LINES), linestyle=_LINES * len(_COLORS))
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
    _draw_sizes(panels[-1], counted)
    if worded:
        _draw_lengths(panels[0], worded)
        _draw_vocabulary(panels[1], panels[2], worded, ranked, min_count)
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
    axes.locator_params(axis="x", integer=True)
    axes.set(xlim=(0, 1.3 * max(most, _MAX_WORDS)), ylim=(0, None))
    axes.set(title="Caption length", xlabel="words", ylabel="% of the split's captions")
    axes.legend(loc="upper right", fontsize="small")


def _draw_vocabulary(
    frequency: "Axes",
    coverage: "Axes",
    worded: Sequence[_Counted],
    ranked: Sequence[tuple[str, int]],
    min_count: int,
) -> None:
    words, counts = zip(*ranked, strict=True)
    split, kept = worded[0].split.name, sum(count >= min_count for count in counts)
    frequency.loglog(range(1, len(counts) + 1), counts, label=f"words of {split}")
    label = f"{min_count:,} times: {kept:,} of {len(counts):,} words"
    frequency.axhline(min_count, label=label, **_GUIDE)
    frequency.set(title="Word frequency", xlabel="rank of the word", ylabel="times in the captions")
    frequency.legend(loc="upper right", fontsize="small")
    for each in worded:
        # Among the first 0, 1, 2, ... words.
        known = np.cumsum([0, *(each.words[word] for word in words)])
        coverage.semilogx(100 * known / each.words.total(), label=each.split.name)
    coverage.axvline(kept, label=f"{kept:,} words", **_GUIDE)
    coverage.set(xlim=(1, 1.1 * len(words)), ylim=(0, 102), title=f"Coverage by the words of {split}")
    coverage.set(
        xlabel="words in the vocabulary, most frequent first", ylabel="% of the split's caption words"
    )
    coverage.legend(loc="lower right", fontsize="small")


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
    axes.loglog(base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel="width in pixels", ylabel="height in pixels")
    axes.set_title("Image sizes (area of a dot: share of images)")
    axes.legend(loc="lower right", fontsize="small")
