"""Example captions of a report: with their images, references, and the attention of each word."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from captionscale.config import Config
from captionscale.data.shards import Split
from captionscale.score.metrics import METRICS
from captionscale.score.receipt import Receipt
from captionscale.tools.attend import load_view
from captionscale.tools.board import ranking_metric
from captionscale.tools.caption_result import (
    CaptionResult,
    View,
    base64_jpeg,
    build_caption_results,
    encode_views,
    overlay,
)
from captionscale.train.checkpoint import Checkpoint

IMAGE_PIXELS, WORD_PIXELS = 168, 112
_JPEG_QUALITY = 80
_PER_GROUP = 4

Id = int | str  # of an image; a receipt of captions from elsewhere may have names


class Example(NamedTuple):
    """A caption and a remark about it."""

    image_id: Id
    caption: str
    remark: str


def select_examples(receipt: Receipt) -> dict[str, list[Example]]:
    """Return a few captions of a receipt by title: the best, the worst, and a fixed random choice."""
    metric = ranking_metric(list(receipt.scores))
    images, scores = receipt.images, receipt.images.scores[metric]
    order = np.argsort(-scores, kind="stable").tolist()
    best, worst = order[:_PER_GROUP], order[_PER_GROUP:][-_PER_GROUP:][::-1]
    rest = sorted({*order} - {*best} - {*worst})
    drawn = np.random.default_rng(0).permutation(rest)[:_PER_GROUP].tolist()
    by = f"by {metric}, image by image" if metric in METRICS else f"by {metric}"
    chosen = {f"Best, {by}": best, f"Worst, {by}": worst, "At random": drawn}

    def example(at: int) -> Example:
        return Example(images.ids[at], images.captions[at], f"{metric} {100 * scores[at]:.1f}")

    return {title: [example(at) for at in rows] for title, rows in chosen.items()}


def random_examples(captions: Mapping[int, str]) -> dict[str, list[Example]]:
    """Return a fixed random choice of captions without scores."""
    ids = np.random.default_rng(0).permutation(sorted(captions))[: 2 * _PER_GROUP].tolist()
    return {"At random": [Example(image_id, captions[image_id], "") for image_id in ids]}


def gallery(
    groups: Mapping[str, Sequence[Example]],
    config: Config | None,
    split: Split | None,
    saved: Checkpoint | None,
) -> dict[str, Any]:
    """Return the variables of `report_captions.html` for examples by title.

    There are no images without a config and a split, and no attention without the captions' checkpoint.
    """
    examples = [example for group in groups.values() for example in group]
    views: dict[Id, View] = {}
    references: dict[Id, tuple[str, ...]] = {}
    if split is not None and config is not None:
        items: dict[Id, int] = {name: item for item, name in enumerate(split.index["image_id"].tolist())}
        for example in examples:
            if (item := items.get(example.image_id)) is not None:
                views[example.image_id] = load_view(split, item, config)
                references[example.image_id] = split.captions(item)
    results = _results(examples, views, saved) if saved else {}
    maps = next((result.attention_maps for result in results.values() if result.attention_maps), None)

    def entry(example: Example) -> dict[str, Any]:
        name = example.image_id
        images = _images(views.get(name), results.get(name))
        return {"example": example, "references": references.get(name, ()), **images}

    return {
        "grid": maps[0].shape if maps else None,
        "groups": {title: [entry(example) for example in group] for title, group in groups.items()},
        "image_pixels": IMAGE_PIXELS,
        "word_pixels": WORD_PIXELS,
    }


def _results(
    examples: Sequence[Example], views: Mapping[Id, View], saved: Checkpoint
) -> dict[Id, CaptionResult]:
    """Return probabilities and attention of each example's own caption."""
    captioner, vocabulary = saved.captioner(), saved.vocabulary()
    data = saved.config().data
    seen = [example for example in examples if example.image_id in views and example.caption]
    if not seen:
        return {}
    tokens = [vocabulary.encode(example.caption, data.max_words)[1:] for example in seen]
    features = encode_views(captioner, [views[example.image_id] for example in seen])
    results = build_caption_results(captioner, features, tokens, vocabulary, data.image_size)
    return {example.image_id: result for example, result in zip(seen, results, strict=True)}


def _images(view: View | None, result: CaptionResult | None) -> dict[str, Any]:
    """Return an example's image, and its words with the attention drawn over it, as base64 JPEGs."""
    if view is None:
        return {"image": "", "words": []}
    image, words = Image.fromarray(view), []
    if result is not None:
        small = image.resize((WORD_PIXELS, WORD_PIXELS), Image.Resampling.BICUBIC)
        for number, (word, probability) in enumerate(zip(result.words, result.probabilities, strict=True)):
            drawn = ""
            if result.attention_maps:
                weights = result.attention_maps[number]
                drawn = _jpeg(overlay(small, weights, result.max_attention), WORD_PIXELS)
            words.append({"text": word, "probability": probability, "overlay": drawn})
    return {"image": _jpeg(image, IMAGE_PIXELS), "words": words}


def _jpeg(image: Image.Image, side: int) -> str:
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return base64_jpeg(image, quality=_JPEG_QUALITY, optimize=True)
