"""Captions of a run beside their images, what people wrote, and where the model looked, as HTML."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from captionscale.config import Config
from captionscale.data.shards import Split
from captionscale.escape import for_html
from captionscale.score.metrics import METRICS
from captionscale.score.receipt import Receipt
from captionscale.tools.attend import load_view
from captionscale.tools.caption_result import (
    CaptionResult,
    View,
    build_caption_results,
    encode_views,
    overlay,
)
from captionscale.train.checkpoint import Checkpoint

_PHOTO_PIXELS, _WORD_PIXELS, _QUALITY = 168, 112, 80
_EACH = 4
_RANKED_BY = "CIDEr-D"

Id = int | str
"""Of an image: a receipt of captions from elsewhere may have names."""


class Example(NamedTuple):
    """A caption of a split, and what is known of it."""

    image_id: Id
    caption: str
    remark: str


def select_examples(receipt: Receipt) -> dict[str, list[Example]]:
    """Return a few of a receipt's captions: the best, the worst, and some at random, always the same ones."""
    metric = _RANKED_BY if _RANKED_BY in receipt.scores else list(receipt.scores)[-1]
    figures = receipt.images.scores[metric]
    order = np.argsort(-figures, kind="stable").tolist()
    best, worst = order[:_EACH], order[_EACH:][-_EACH:][::-1]
    rest = sorted({*order} - {*best} - {*worst})
    drawn = np.random.default_rng(0).permutation(rest)[:_EACH].tolist()

    def named(places: Sequence[int]) -> list[Example]:
        found = receipt.images
        return [
            Example(found.ids[at], found.captions[at], f"{metric} {100 * figures[at]:.1f}") for at in places
        ]

    by = f"by {metric}, image by image" if metric in METRICS else f"by {metric}"
    return {f"Best, {by}": named(best), f"Worst, {by}": named(worst), "At random": named(drawn)}


def random_examples(captions: Mapping[int, str]) -> dict[str, list[Example]]:
    """Return a few captions that have no scores, at random, always the same ones."""
    ids = np.random.default_rng(0).permutation(sorted(captions))[: 2 * _EACH].tolist()
    return {"At random": [Example(image_id, captions[image_id], "") for image_id in ids]}


def gallery(
    groups: Mapping[str, Sequence[Example]],
    config: Config | None,
    split: Split | None,
    saved: Checkpoint | None,
) -> str:
    """Return captions as HTML.

    Args:
        groups: Under their titles.
        config: The run's; without it there are no images.
        split: Whose images they are of; none if the shards are not at hand.
        saved: Checkpoint that wrote these captions; none: no attention.
    """
    examples = [example for group in groups.values() for example in group]
    views: dict[Id, View] = {}
    texts: dict[Id, tuple[str, ...]] = {}
    if split is not None and config is not None:
        ids = split.index["image_id"].tolist()
        rows: dict[Id, int] = {image_id: item for item, image_id in enumerate(ids)}
        for example in examples:
            if (item := rows.get(example.image_id)) is not None:
                views[example.image_id] = load_view(split, item, config.data)
                texts[example.image_id] = split.captions(item)
    gazes = _gazes(examples, views, saved) if saved is not None else {}
    lines = []
    if maps := next((gaze.attention_maps for gaze in gazes.values() if gaze.attention_maps), None):
        side, across = maps[0].shape
        lines.append(
            f"<p>It divides a picture into {side} x {across} cells, and where it looked can be told no finer;"
            " the colours between their centres are blended.</p>"
        )
    for title, group in groups.items():
        lines += [f"<h3>{for_html(title)}</h3>"] * bool(group)
        lines += [
            _article(each, views.get(each.image_id), texts.get(each.image_id, ()), gazes.get(each.image_id))
            for each in group
        ]
    return "\n".join(lines)


def _gazes(
    examples: Sequence[Example], views: Mapping[Id, View], saved: Checkpoint
) -> dict[Id, CaptionResult]:
    """Return where the model looked for the words of these very captions."""
    captioner, vocabulary = saved.captioner(), saved.vocabulary()
    longest = saved.config().data.max_words
    seen = [example for example in examples if example.image_id in views and example.caption]
    if not seen:
        return {}
    tokens = [vocabulary.encode(example.caption, longest)[1:] for example in seen]
    features = encode_views(captioner, [views[example.image_id] for example in seen])
    gazes = build_caption_results(captioner.decoder, features, tokens, vocabulary)
    return {example.image_id: gaze for example, gaze in zip(seen, gazes, strict=True)}


def _article(example: Example, view: View | None, people: Sequence[str], gaze: CaptionResult | None) -> str:
    photo = ""
    if view is not None:
        picture = Image.fromarray(view)
        photo = _image(picture, _PHOTO_PIXELS, f"image {example.image_id}")
    words = ""
    if gaze is not None and view is not None:
        small = Image.fromarray(view).resize((_WORD_PIXELS, _WORD_PIXELS), Image.Resampling.BICUBIC)
        figures = []
        for number, (word, share) in enumerate(zip(gaze.words, gaze.probabilities, strict=True)):
            shown = ""
            if gaze.attention_maps:
                alt = f"where the model looked for {word}"
                shown = _image(
                    overlay(small, gaze.attention_maps[number], gaze.max_attention), _WORD_PIXELS, alt
                )
            text = f"{for_html(word)} <small>{share:.2f}</small>"
            figures.append(f"<figure><figcaption>{text}</figcaption>{shown}</figure>")
        words = f'<div class="words">{"".join(figures)}</div>'
    wrote = "".join(f"<li>{for_html(text)}</li>" for text in people)
    people_said = f"<details open><summary>What people wrote</summary><ul>{wrote}</ul></details>" * bool(
        wrote
    )
    remark = " · ".join(filter(None, (f"image {example.image_id}", example.remark)))
    caption = for_html(example.caption) or "<i>an empty caption</i>"
    return (
        f'<article><div class="photo">{photo}</div><div><p class="caption">{caption}</p>'
        f'<p class="facts">{for_html(remark)}</p>{words}{people_said}</div></article>'
    )


def _image(picture: Image.Image, side: int, alt: str) -> str:
    file = io.BytesIO()
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=_QUALITY, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{side}" height="{side}" alt="{for_html(alt)}">'
