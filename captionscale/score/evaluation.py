"""Score captions against references, with all that a receipt records."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64

from captionscale.errors import UserError
from captionscale.machine import cpu_count, cpu_name
from captionscale.score import intervals
from captionscale.score.diagnostics import diagnose
from captionscale.score.metrics import METRICS, Metrics, Scores, measure
from captionscale.score.receipt import (
    ImageResults,
    Receipt,
    References,
    captions_sha256,
    references_sha256,
)
from captionscale.score.signature import signature
from captionscale.vocab import split_words

_DIGITS = 10

Captions: TypeAlias = Mapping[int, str] | Mapping[str, str]
"""The caption of each image."""
Measure: TypeAlias = Callable[[Mapping[int, str], Mapping[int, Sequence[str]], Metrics], Scores]
"""`metrics.measure`, or an evaluator's."""


def score(
    captions: Captions,
    references: References,
    metrics: Metrics = tuple(METRICS),
    *,
    measure: Measure = measure,
    train_captions: Sequence[str] | None = None,
    vocabulary_size: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
    hardware: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Receipt:
    """Score one caption for each image against its references.

    Args:
        captions: The caption of each image. An image's id is an int, or a str such as its file name.
        references: One or more for each image.
        metrics: Names of `metrics.METRICS`, `module:Class`, or objects.
        measure: `metrics.Evaluator.measure` is faster if other captions follow.
        train_captions: All captions the model was trained on, to count novel captions.
        vocabulary_size: Number of words that the model can generate.
        provenance: What generated the captions, for the receipt.
        hashes: SHA-256 of what generated them.
        hardware: More facts about the machine.
        notes: What a reader of the scores must know.

    Returns:
        The scores with everything that they depend on. The same call returns the same receipt except for
        `environment`.

    Raises:
        UserError: As `metrics.Evaluator.measure`.

    Examples:
        >>> captions = {"dog.jpg": "a dog runs", "cat.jpg": "a cat on a mat"}
        >>> references = {"dog.jpg": ["A dog is running."], "cat.jpg": ["A cat sits on a mat.", "a cat"]}
        >>> receipt = score(captions, references, ["BLEU-1", "CIDEr-D"])
        >>> round(receipt.scores["BLEU-1"], 4)
        0.6815
    """
    ids, captions_by_number, references_by_number = _numbered(captions, references)
    found = measure(captions_by_number, references_by_number, metrics)
    statistics = {family: _rounded(rows) for family, rows in found.statistics.items()}
    resampled = intervals.bootstrap_scores(statistics, found.metrics)
    diagnostics = diagnose(
        captions, references, train_captions=train_captions, vocabulary_size=vocabulary_size
    )
    provenance = dict(provenance or {})
    empty = round(diagnostics["captions"]["empty"] * len(ids))
    return Receipt(
        scores={name: round(value, _DIGITS) for name, value in found.values.items()},
        intervals={name: intervals.interval(scores) for name, scores in resampled.items()},
        bootstrap={
            "confidence": intervals.CONFIDENCE,
            "method": "percentile, over images",
            "resamples": intervals.RESAMPLES,
            "seed": intervals.SEED,
        },
        diagnostics=diagnostics,
        counts={
            "images": len(ids),
            "captions": len(captions),
            "empty_captions": empty,
            "words": sum(len(split_words(caption)) for caption in captions.values()),
            "references": sum(map(len, references.values())),
        },
        hashes={
            "captions": captions_sha256(captions),
            "references": references_sha256(references),
            **(hashes or {}),
        },
        signature=signature(found.metrics, references_sha256(references), len(ids), provenance),
        provenance=provenance,
        notes=[*notes, *_notes(found, empty)],
        environment={
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "hardware": {"cpu": cpu_name(), "cores": cpu_count(), **(hardware or {})},
            "python": platform.python_version(),
        },
        images=ImageResults(
            ids,
            [captions[image_id] for image_id in ids],
            {name: _rounded(values) for name, values in found.per_image.items()},
            statistics,
        ),
    )


def _numbered(captions: Any, references: Any) -> tuple[Any, dict[int, str], dict[int, Sequence[str]]]:
    """Return the sorted ids, and captions and references by number, as the evaluator expects."""
    for image_id, caption in captions.items():
        if not isinstance(caption, str):
            raise UserError(
                f"score: the caption of image {image_id!r} is {caption!r:.40}, expected a str; give one"
            )
    for image_id, texts in references.items():
        if not (isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)):
            raise UserError(
                f"score: the references of image {image_id!r} are {texts!r:.40}, expected a list of str;"
                " give one"
            )
    kinds = {type(image_id) for image_id in (*captions, *references)}
    if len(kinds) > 1 or not kinds <= {int, str}:
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(
            f"score: image ids are {found}, expected all int or all str; use the same ids in captions and"
            " references"
        )
    ids = sorted({*captions, *references})
    if str not in kinds:
        return ids, captions, references
    for name in ids:
        if name not in captions or name not in references:
            raise UserError(
                f"score: image {name!r} has only {'a caption' if name in captions else 'references'};"
                " expected both for each image; give both for the same images"
            )
    return (
        ids,
        {number: captions[name] for number, name in enumerate(ids)},
        {number: references[name] for number, name in enumerate(ids)},
    )


def _notes(found: Scores, empty: int) -> Iterator[str]:
    images = len(found.image_ids)
    if empty:
        yield f"{empty:,} of {images:,} captions are empty"
    if found.reference_implementation:
        yield "measured by pycocoevalcap's own classes"
    if images == 1 and "CIDEr-D" in found.values:
        yield "CIDEr-D of a single image is 0: no word is rarer than another"


def _rounded(values: Any) -> Float64[np.ndarray, "..."]:
    """Return values without the digits in which processors differ."""
    return np.asarray(values, dtype=np.float64).round(_DIGITS)
