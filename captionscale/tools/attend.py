"""Pictures of attention: the photograph as the model saw it, then one panel for each word."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from captionscale import config
from captionscale.data.decode import decode_image
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.data.transforms import center_crop
from captionscale.errors import UserError
from captionscale.escape import for_file_name, for_terminal
from captionscale.files import atomic_write, check_writable
from captionscale.progress import progress, say, spinner
from captionscale.tools.caption_result import CaptionResult, View, overlay
from captionscale.tools.captioner_api import CaptionPipeline
from captionscale.tools.ensemble import open_ensemble

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 150
_TILE_PIXELS = 240
_ACROSS = 6
_ROWS_OF_A_PAGE = 10
_MANY_PAGES = 10
"""More take minutes."""


class _Size(NamedTuple):
    """A tile's side and the room above it for its title, in inches, and letters, in points."""

    tile: float
    title: float
    letters: float


_PICTURE, _SHEET = _Size(1.7, 0.42, 9.0), _Size(0.92, 0.3, 6.0)
_GAP, _MARGIN, _FOOT = 0.06, 0.15, 0.55


class _Tile(NamedTuple):
    picture: Image.Image
    title: str


def attend(
    run: Path, files: Sequence[Path], out: Path, *, checkpoint: str, overrides: Sequence[str] = ()
) -> Iterator[tuple[Path, CaptionResult]]:
    """Draw where a run's model looks for each word of its captions of image files.

    Args:
        run: The --out of captionscale train.
        files: Images.
        out: Folder for a PNG of each, named after it.
        checkpoint: `best`, `last` or a step.
        overrides: `search.key=value` each, instead of the run's own.

    Yields:
        Each picture, once it is written, and what it shows.

    Raises:
        UserError: No run, a decoder without attention, no image, or a place that cannot be written.
    """
    writer = _open(run, checkpoint, overrides)
    names = _names(files, out)
    for place in names:
        check_writable(place)
    # All of them first: the tenth may be no image.
    views = [writer.view(file) for file in files]
    with spinner(f"captioning {len(views):,} images"):
        gazes = writer.generate_best(views, writer.generation_request(), range(len(views)))
    for place, view, each in zip(names, views, gazes, strict=True):
        tiles = _tiles(view, each)
        rows = [tiles[start : start + _ACROSS] for start in range(0, len(tiles), _ACROSS)]
        _write(_draw(rows, _PICTURE, each.caption, [each]), place)
        yield place, each


def attend_split(
    run: Path,
    split_name: str,
    out: Path,
    *,
    checkpoint: str,
    shards: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[Path]:
    """Draw the same for a split: a row for each image, ten rows on a page.

    Args:
        run: The --out of captionscale train.
        split_name: Of the run's shards; it need not have captions.
        out: Folder for the pages, PNGs.
        checkpoint: `best`, `last` or a step.
        shards: Instead of the run's own.
        limit: Only so many images, the first ones.
        overrides: `search.key=value` each, instead of the run's own.

    Yields:
        Each page, once it is written.

    Raises:
        UserError: No run or split, a decoder without attention, damaged shards, or a place that cannot be
            written.
    """
    writer = _open(run, checkpoint, overrides)
    generation_request, data = writer.generation_request(), writer.ensemble.config.data
    split = Split(open_storage(shards or data.shards, data.cache, data.cache_gb), split_name)
    count = min(len(split), limit or len(split))
    pages = -(-count // _ROWS_OF_A_PAGE)
    digits = max(3, len(str(pages)))
    check_writable(out / for_file_name(split_name, f"-{1:0{digits}d}.png"))
    fewer = "; --limit draws fewer" if limit is None and pages > _MANY_PAGES else ""
    say(f"{split.storage}: {count:,} of {len(split):,} images of {split_name} on {pages:,} pages{fewer}")
    with progress(f"attention of {split_name}", count) as bar:
        for page in range(pages):
            items = range(page * _ROWS_OF_A_PAGE, min((page + 1) * _ROWS_OF_A_PAGE, count))
            views = [load_view(split, item, data) for item in items]
            ids = [int(split.index[item]["image_id"]) for item in items]
            # As captionscale score has them.
            gazes = writer.generate_best(views, generation_request, ids)
            rows = [_tiles(*each) for each in zip(views, gazes, ids, strict=True)]
            title = f"{run.resolve().name}, split {split_name}, page {page + 1} of {pages}"
            place = out / for_file_name(split_name, f"-{page + 1:0{digits}d}.png")
            _write(_draw(rows, _SHEET, title, gazes), place)
            yield place
            bar.advance(len(items))


def load_view(split: Split, item: int, data: config.Data) -> View:
    """Return an item of a split as the model sees it."""
    place = f"{split.storage}: image {split.index[item]['image_id']}"
    return center_crop(decode_image(split.image(item), place), data.image_size)


def _open(run: Path, checkpoint: str, overrides: Sequence[str]) -> CaptionPipeline:
    members = open_ensemble(run, (), checkpoint=checkpoint, overrides=overrides)
    decoder = members.config.model.decoder.name
    if decoder == "plain":
        raise UserError(
            f"{run}: its decoder is '{decoder}', which sees the picture once, as a whole, and has no"
            " attention to draw; wanted model.decoder.name = 'attention' or 'top_down'; take such"
            " a run, or captionscale caption for captions alone"
        )
    return CaptionPipeline(members)


def _names(files: Sequence[Path], out: Path) -> list[Path]:
    """Return where each file's picture goes; two files of one name in two folders do not share one."""
    names: list[Path] = []
    for file in files:
        place, number = out / for_file_name(file.stem, "-attention.png"), 2
        while place in names:
            place, number = out / for_file_name(file.stem, f"-{number}-attention.png"), number + 1
        names.append(place)
    return names


def _tiles(view: View, gaze: CaptionResult, image_id: int | None = None) -> list[_Tile]:
    """Return the photograph and a panel for each word."""
    photo = Image.fromarray(view).resize((_TILE_PIXELS, _TILE_PIXELS), Image.Resampling.BICUBIC)
    said = zip(gaze.words, gaze.probabilities, gaze.attention_maps or (), strict=True)
    return [
        _Tile(photo, "as the model saw it" if image_id is None else f"image {image_id}"),
        *(
            _Tile(overlay(photo, each, gaze.max_attention), f"{for_terminal(word)}\n{share:.2f}")
            for word, share, each in said
        ),
    ]


def _draw(
    rows: Sequence[Sequence[_Tile]], size: _Size, heading: str, gazes: Sequence[CaptionResult]
) -> "Figure":
    """Return rows of tiles with their titles, and what their colours mean."""
    # A notebook names its own backend here for all that it starts, and without that one there is no import.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure

    across, down = max(map(len, rows)), len(rows)
    step, line = size.tile + _GAP, size.tile + size.title
    width = max(2 * _MARGIN + across * step, 4.6)
    height = 2 * _MARGIN + 0.3 + down * line + _FOOT
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")

    def write(x: float, y: float, text: str, letters: float, **options: Any) -> None:
        # No formula: a caption may hold any letter.
        figure.text(x / width, y / height, text, fontsize=letters, parse_math=False, color="black", **options)

    write(_MARGIN, height - _MARGIN, for_terminal(heading), size.letters + 3, va="top", weight="bold")
    for row, tiles in enumerate(rows):
        bottom = height - _MARGIN - 0.3 - (row + 1) * line
        for column, tile in enumerate(tiles):
            left = _MARGIN + column * step
            box = (left / width, bottom / height, size.tile / width, size.tile / height)
            axes = figure.add_axes(box)
            axes.imshow(np.asarray(tile.picture), interpolation="lanczos")
            axes.set_axis_off()
            middle = left + size.tile / 2
            write(middle, bottom + size.tile + 0.03, tile.title, size.letters, ha="center", va="bottom")
    alone = gazes[0].max_attention if len(gazes) == 1 else None
    _legend(figure, (width, height), size.letters, alone, gazes[0])
    write(
        _MARGIN,
        0.12,
        "Above each panel: the word, and its probability given the picture and the words before it.",
        size.letters,
        va="bottom",
    )
    return figure


def _legend(
    figure: "Figure", page: tuple[float, float], letters: float, most: float | None, gaze: CaptionResult
) -> None:
    """Show the colours of no attention up to the most, as they lie over a medium grey."""
    width, height = page
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    strip = overlay(Image.new("L", (256, 1), 128), ramp, 1.0)
    axes = figure.add_axes((_MARGIN / width, 0.36 / height, 1.6 / width, 0.12 / height))
    axes.imshow(np.asarray(strip), aspect="auto")
    axes.set_axis_off()
    if most is None:
        text = "attention of a place: none (left) to the most that its caption has anywhere (right)"
    else:
        cells = gaze.attention_maps[0].size if gaze.attention_maps else 1
        even = f"{1 / cells:.2f} where it looks at all {cells} alike"
        text = f"attention of a cell of the grid: 0 (left) to {most:.2f} of the whole (right); {even}"
    left = (_MARGIN + 1.7) / width
    figure.text(left, 0.42 / height, text, fontsize=letters, va="center", color="black")


def _write(figure: "Figure", place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place) as file:
        figure.savefig(file, format="png")
