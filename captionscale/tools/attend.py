"""Attention figures: the image as the model saw it, then one panel for each word."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from captionscale.config import Config
from captionscale.data.decode import decode_image
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.data.transforms import center_crop
from captionscale.errors import UserError
from captionscale.escape import for_file_name, for_terminal
from captionscale.files import atomic_write, check_writable
from captionscale.model.encoders.encoder import interpolation_of
from captionscale.progress import progress, say, spinner
from captionscale.tools.caption_result import CaptionResult, View, overlay
from captionscale.tools.captioner_api import CaptionPipeline
from captionscale.tools.ensemble import open_ensemble

_DPI = 150
_PANEL_PIXELS = 240
_COLUMNS = 6
_ROWS_PER_PAGE = 10
_MANY_PAGES = 10  # more take minutes


class _Size(NamedTuple):
    panel: float  # side, in inches
    title: float  # height, in inches
    font: float  # in points


_FIGURE, _PAGE = _Size(1.7, 0.42, 9.0), _Size(0.92, 0.3, 6.0)
_GAP, _MARGIN, _FOOT = 0.06, 0.15, 0.55
_Panel = tuple[Image.Image, str]  # with its title


def attend(
    run: Path, files: Sequence[Path], out: Path, *, checkpoint: str, overrides: Sequence[str]
) -> Iterator[tuple[Path, CaptionResult]]:
    """Draw the attention of each word of a run's captions of image files, one PNG each in the folder `out`.

    Yields:
        Each figure's path, once it is written, and what it shows.

    Raises:
        UserError: No run, a decoder without attention, no image, or a figure that cannot be written.
    """
    pipeline = _open(run, checkpoint, overrides)
    paths = _paths(files, out)
    for path in paths:
        check_writable(path)
    # All of them first: the tenth may be no image.
    views = [pipeline.view(file) for file in files]
    with spinner(f"captioning {len(views):,} images"):
        results = pipeline.generate_best(views, pipeline.generation_request(), range(len(views)))
    for path, view, result in zip(paths, views, results, strict=True):
        panels = _panels(view, result)
        rows = [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
        _write(path, rows, _FIGURE, result.caption, [result])
        yield path, result


def attend_split(
    run: Path,
    split_name: str,
    out: Path,
    *,
    checkpoint: str,
    shards: str | None,
    limit: int | None,
    overrides: Sequence[str],
) -> Iterator[Path]:
    """Draw the same for the first `limit` images of a split: a row for each, ten rows on a page.

    Yields:
        Each page's path, once it is written.

    Raises:
        UserError: No run or split, a decoder without attention, damaged shards, or no writable page.
    """
    pipeline = _open(run, checkpoint, overrides)
    request, settings = pipeline.generation_request(), pipeline.ensemble.config
    data = settings.data
    split = Split(open_storage(shards or data.shards, data.cache, data.cache_gb), split_name)
    count = min(len(split), limit or len(split))
    pages = -(-count // _ROWS_PER_PAGE)
    digits = max(3, len(str(pages)))
    check_writable(out / for_file_name(split_name, f"-{1:0{digits}d}.png"))
    hint = "; --limit draws fewer" if limit is None and pages > _MANY_PAGES else ""
    say(f"{split.storage}: {count:,} of {len(split):,} images of {split_name} on {pages:,} pages{hint}")
    with progress(f"attention of {split_name}", count) as bar:
        for page in range(pages):
            items = range(page * _ROWS_PER_PAGE, min((page + 1) * _ROWS_PER_PAGE, count))
            views = [load_view(split, item, settings) for item in items]
            # The numbers that captionscale score samples with.
            ids = [int(split.index[item]["image_id"]) for item in items]
            results = pipeline.generate_best(views, request, ids)
            rows = [_panels(*each) for each in zip(views, results, ids, strict=True)]
            title = f"{run.resolve().name}, split {split_name}, page {page + 1} of {pages}"
            path = out / for_file_name(split_name, f"-{page + 1:0{digits}d}.png")
            _write(path, rows, _PAGE, title, results)
            yield path
            bar.advance(len(items))


def load_view(split: Split, item: int, config: Config) -> View:
    """Return an item of a split as the model sees it."""
    place = f"{split.storage}: image {split.index[item]['image_id']}"
    image = decode_image(split.image(item), place)
    return center_crop(image, config.data.image_size, interpolation_of(config.model))


def _open(run: Path, checkpoint: str, overrides: Sequence[str]) -> CaptionPipeline:
    ensemble = open_ensemble(run, (), checkpoint=checkpoint, overrides=overrides)
    decoder = ensemble.config.model.decoder.name
    if not ensemble.config.model.decoder.has_attention:
        raise UserError(
            f"{run}: its decoder is '{decoder}', which has no attention to draw,"
            " expected model.decoder.name = 'attention' or 'top_down'; choose such a run, or"
            " captionscale caption for captions alone"
        )
    return CaptionPipeline(ensemble)


def _paths(files: Sequence[Path], out: Path) -> list[Path]:
    """Return the path of each file's figure, different ones for files of one name in two folders."""
    paths: list[Path] = []
    for file in files:
        path, number = out / for_file_name(file.stem, "-attention.png"), 2
        while path in paths:
            path, number = out / for_file_name(file.stem, f"-{number}-attention.png"), number + 1
        paths.append(path)
    return paths


def _panels(view: View, result: CaptionResult, image_id: int | None = None) -> list[_Panel]:
    """Return the image and a panel for each word."""
    image = Image.fromarray(view).resize((_PANEL_PIXELS, _PANEL_PIXELS), Image.Resampling.BICUBIC)
    words = zip(result.words, result.probabilities, result.attention_maps or (), strict=True)
    panels = [(image, "as the model saw it" if image_id is None else f"image {image_id}")]
    for word, probability, weights in words:
        title = f"{for_terminal(word)}\n{probability:.2f}"
        panels.append((overlay(image, weights, result.max_attention), title))
    return panels


def _write(
    path: Path, rows: Sequence[Sequence[_Panel]], size: _Size, heading: str, results: Sequence[CaptionResult]
) -> None:
    """Draw rows of panels with their titles, and a legend of the colors."""
    # A notebook sets this for its children, in which its backend cannot be imported.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure

    step, line = size.panel + _GAP, size.panel + size.title
    width = max(2 * _MARGIN + max(map(len, rows)) * step, 4.6)
    height = 2 * _MARGIN + 0.3 + len(rows) * line + _FOOT
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")

    # In inches, as all lengths here.
    def write(x: float, y: float, text: str, font: float = size.font, **options: Any) -> None:
        # No formula: a caption may hold any character.
        figure.text(x / width, y / height, text, fontsize=font, parse_math=False, color="black", **options)

    def show(image: Any, left: float, bottom: float, wide: float, high: float, **options: Any) -> None:
        axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
        axes.imshow(np.asarray(image), **options)
        axes.set_axis_off()

    write(_MARGIN, height - _MARGIN, for_terminal(heading), size.font + 3, va="top", weight="bold")
    for row, panels in enumerate(rows):
        bottom = height - _MARGIN - 0.3 - (row + 1) * line
        for column, (image, title) in enumerate(panels):
            left = _MARGIN + column * step
            show(image, left, bottom, size.panel, size.panel, interpolation="lanczos")
            write(left + size.panel / 2, bottom + size.panel + 0.03, title, ha="center", va="bottom")
    # The colors from no attention to the maximum, over medium gray.
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    show(overlay(Image.new("L", (256, 1), 128), ramp, 1.0), _MARGIN, 0.36, 1.6, 0.12, aspect="auto")
    legend = "attention of a cell: none (left) to the maximum of its caption (right)"
    if len(results) == 1:
        maps, most = results[0].attention_maps, results[0].max_attention
        uniform = 1 / maps[0].size if maps else 1
        legend = f"attention of a grid cell: 0 (left) to {most:.2f} of the total (right);"
        legend += f" uniform attention is {uniform:.2f}"
    write(_MARGIN + 1.7, 0.42, legend, va="center")
    note = "Above each panel: the word, and its probability given the image and the words before it."
    write(_MARGIN, 0.12, note, va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
