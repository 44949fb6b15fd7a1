"""What a score is worth: the figures beside all that made them, in one file."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import MB, atomic_write, read_file
from captionscale.machine import cpu_count, cpu_name
from captionscale.score import intervals, receipt_schema
from captionscale.score.diagnostics import Diagnostics, diagnose
from captionscale.score.metrics import METRICS, Scores, measure
from captionscale.score.optional_metrics import OptionalMetrics
from captionscale.score.signature import metric_signature, signature
from captionscale.vocab import split_words

FORMAT = 3
_SEED = 0
_DIGITS = 10

Captions: TypeAlias = Mapping[int, str] | Mapping[str, str]
"""The caption of each image."""
References: TypeAlias = Mapping[int, Sequence[str]] | Mapping[str, Sequence[str]]
"""The human captions of each image."""
Measure: TypeAlias = Callable[[Mapping[int, str], Mapping[int, Sequence[str]], Sequence[str]], Scores]
"""`metrics.measure`, or an evaluator's."""


@dataclass(frozen=True, eq=False)
class ImageResults:
    """What a receipt holds of each image, all in the order of `ids`."""

    ids: list[int] | list[str]
    captions: list[str]
    scores: dict[str, Float64[np.ndarray, "image"]]
    """Of each metric."""
    statistics: dict[str, Float64[np.ndarray, "image _"]]
    """Of each family of metrics: their sums over any images give these images' corpus figures."""


@dataclass(frozen=True, eq=False)
class Receipt:
    """Scores, and what they are of.

    Attributes:
        scores: The corpus figure of each metric, 0 to 1 (CIDEr-D: 0 to 10; CLIPScore: 0 to 2.5).
        intervals: Of each, where 95 % of the figures of other sets of images lie.
        bootstrap: How these were drawn.
        diagnostics: What the captions look like, beside people's.
        counts: Images, captions, empty ones among them, their words, references.
        hashes: SHA-256 of captions and references, and of what the captions were made with.
        signature: What was measured with what, in parts between `|`; see `metric_signature`.
        provenance: What made the captions.
        notes: What a reader of the figures must know.
        environment: When, where and on what machine; everything else is the same wherever the command is given again.
        images: Each one's caption, scores and statistics.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    bootstrap: dict[str, Any]
    diagnostics: Diagnostics
    counts: dict[str, int]
    hashes: dict[str, str]
    signature: str
    provenance: dict[str, Any]
    notes: list[str]
    environment: dict[str, Any]
    images: ImageResults

    @property
    def metric_signature(self) -> dict[str, str]:
        """What the figures were measured with: parts of the signature by their first word.

        Two receipts may be ranked together if no part that both have differs.
        """
        return metric_signature(self.signature)

    @property
    def sha256(self) -> str:
        """Hash of everything but `environment`: two receipts that share it are the same."""
        return _hash({name: value for name, value in self._to_dict().items() if name != "environment"})

    def write(self, path: Path | str) -> None:
        """Write the receipt as JSON.

        Raises:
            UserError: The place cannot be written.
        """
        tree = self._to_dict()
        images = tree.pop("images")
        # A key a line, so that people can read the head.
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items()]
        lines += [f'"sha256": "{self.sha256}"', f'"images": {json.dumps(images, separators=(",", ":"))}']
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @staticmethod
    def read(path: Path) -> "Receipt":
        """Read what `write` wrote, and prove that nobody has changed it since (but for `environment`).

        Raises:
            UserError: No receipt, one that was cut short or edited, or one of another version.
        """
        if not path.exists():
            raise UserError(f"{path}: not there, wanted a receipt, or a run that is scored; correct the path")
        try:
            tree = parsing.loads(read_file(path, 512 * MB))
            if not isinstance(tree, dict) or "format" not in tree:
                raise ValueError("it has no key 'format'")
            if tree.pop("format") != FORMAT:
                raise UserError(
                    f"{path}: a receipt of another version, wanted format {FORMAT}; score the captions again"
                )
            written, environment = tree.pop("sha256"), tree.pop("environment")
            if _hash({"format": FORMAT, **tree}) != written:
                raise UserError(
                    f"{path}: was changed after it was written: its own sha256 {str(written)[:12]}... does"
                    " not fit; wanted it as it was; take the original, or score the captions again"
                )
            receipt_schema.check({**tree, "environment": environment})
            images = tree.pop("images")
            bounds = {metric: (low, high) for metric, (low, high) in tree.pop("intervals").items()}
            return Receipt(
                **tree,
                intervals=bounds,
                environment=environment,
                images=ImageResults(
                    images["ids"],
                    images["captions"],
                    {metric: np.asarray(figures, float) for metric, figures in images["scores"].items()},
                    {family: np.asarray(rows, float) for family, rows in images["statistics"].items()},
                ),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: no receipt, or not a whole one ({getattr(error, 'strerror', error)}); wanted what"
                " captionscale score writes; score the captions again"
            ) from None

    def _to_dict(self) -> dict[str, Any]:
        facts = {"format": FORMAT} | {name: getattr(self, name) for name in self.__dataclass_fields__}
        return facts | {
            "intervals": {metric: list(bounds) for metric, bounds in self.intervals.items()},
            "images": {
                "ids": self.images.ids,
                "captions": self.images.captions,
                "scores": {metric: figures.tolist() for metric, figures in self.images.scores.items()},
                "statistics": {name: _plain(rows) for name, rows in self.images.statistics.items()},
            },
        }


def score(
    captions: Captions,
    references: References,
    metrics: Sequence[str] = METRICS,
    *,
    measure: Measure = measure,
    optional_metrics: Sequence[OptionalMetrics] = (),
    train_captions: Sequence[str] | None = None,
    vocabulary_size: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
    hardware: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Receipt:
    """Score one caption for each image against what people wrote about it.

    Args:
        captions: The caption of each image. An image's id is a number or a text, such as its file's name.
        references: The human captions of each image, any number from one up.
        metrics: Which of `metrics.METRICS`.
        measure: How; `metrics.Evaluator.measure` is faster where other captions follow.
        optional_metrics: Figures of other metrics, of the same images by ascending id.
        train_captions: All captions that the model was trained on, to tell what is novel.
        vocabulary_size: How many words the model can say.
        provenance: What made the captions, for the receipt.
        hashes: SHA-256 of things in it.
        hardware: What else to say of the machine.
        notes: What a reader of the figures must know.

    Returns:
        The scores with what they are of. The same call gives the same receipt, but for `environment`.

    Raises:
        UserError: As `metrics.measure`.

    Examples:
        >>> captions = {"dog.jpg": "a dog runs", "cat.jpg": "a cat on a mat"}
        >>> references = {"dog.jpg": ["A dog is running."], "cat.jpg": ["A cat sits on a mat.", "a cat"]}
        >>> receipt = score(captions, references, ["BLEU-1", "CIDEr-D"])
        >>> round(receipt.scores["BLEU-1"], 4)
        0.6815
    """
    ids, captions_by_number, references_by_number = _numbered(captions, references)
    found = measure(captions_by_number, references_by_number, metrics)
    figures = {metric: _rounded(values) for metric, values in found.per_image.items()}
    statistics, values = dict(found.statistics), dict(found.values)
    for extra in optional_metrics:
        values |= extra.values
        for metric, each in extra.per_image.items():
            figures[metric] = _rounded(each)
            statistics[metric] = np.stack([each, np.ones(len(each))], axis=1)
    statistics = {family: _rounded(rows) for family, rows in statistics.items()}
    values = {metric: round(value, _DIGITS) for metric, value in values.items()}
    drawn = intervals.bootstrap_scores(statistics, list(values), seed=_SEED)
    provenance = dict(provenance or {})
    look = diagnose(captions, references, train_captions=train_captions, vocabulary_size=vocabulary_size)
    empty = round(look["captions"]["empty"] * len(ids))
    return Receipt(
        scores=values,
        intervals={metric: intervals.interval(each) for metric, each in drawn.items()},
        bootstrap={
            "confidence": intervals.CONFIDENCE,
            "method": "percentile, over images",
            "resamples": intervals.RESAMPLES,
            "seed": _SEED,
        },
        diagnostics=look,
        counts={
            "images": len(ids),
            "captions": len(captions),
            "empty_captions": empty,
            "words": sum(len(split_words(caption)) for caption in captions.values()),
            "references": sum(map(len, references.values())),
        },
        hashes={
            "captions": _hash(sorted([image_id, caption] for image_id, caption in captions.items())),
            "references": references_sha256(references),
            **(hashes or {}),
        },
        signature=signature(metrics, references_sha256(references), len(ids), optional_metrics, provenance),
        provenance=provenance,
        notes=[*notes, *_notes(found, empty)],
        environment={
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "hardware": {"cpu": cpu_name(), "cores": cpu_count(), **(hardware or {})},
            "python": platform.python_version(),
        },
        images=ImageResults(ids, [captions[image_id] for image_id in ids], figures, statistics),
    )


def references_sha256(references: References) -> str:
    """Return a hash that two sets of references share if they score alike.

    White space and the order of an image's captions, in which copies of one data set differ, do not count.
    """
    plain = {image_id: [" ".join(text.split()) for text in texts] for image_id, texts in references.items()}
    return _hash([[image_id, sorted(plain[image_id])] for image_id in sorted(plain)])


def _numbered(captions: Any, references: Any) -> tuple[Any, dict[int, str], dict[int, Sequence[str]]]:
    """Return the ids in their order, and captions and references by number, as the evaluator knows images."""
    for image_id, caption in captions.items():
        if not isinstance(caption, str):
            raise UserError(
                f"score: the caption of image {image_id!r} is {caption!r:.40}, wanted a str; give one"
            )
    for image_id, texts in references.items():
        if not (isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)):
            raise UserError(
                f"score: the references of image {image_id!r} are {texts!r:.40}, wanted a list of str;"
                " give one"
            )
    kinds = {type(image_id) for image_id in (*captions, *references)}
    if not kinds <= {int} and not kinds <= {str}:
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(
            f"score: images are named by {found}, wanted int alone or str alone; name them alike in captions"
            " and references"
        )
    ids = sorted({*captions, *references})
    if kinds <= {int}:
        return ids, captions, references
    if odd := captions.keys() ^ references.keys():
        raise UserError(
            f"score: image {min(odd)!r} has {'a caption' if min(odd) in captions else 'references'} alone;"
            " wanted both for each image; give both for the same images"
        )
    numbers = dict(enumerate(ids))
    return (
        ids,
        {number: captions[name] for number, name in numbers.items()},
        {number: references[name] for number, name in numbers.items()},
    )


def _notes(found: Scores, empty: int) -> Iterator[str]:
    images = len(found.image_ids)
    if empty:
        yield f"{empty:,} of {images:,} captions are empty"
    if found.reference_implementation:
        yield "measured by pycocoevalcap's own classes"
    if images == 1 and "CIDEr-D" in found.values:
        yield "CIDEr-D of a lone image is 0: no word is rarer than another"


def _rounded(figures: Any) -> Float64[np.ndarray, "..."]:
    """Return figures without the digits in which processors differ."""
    return np.asarray(figures, dtype=np.float64).round(_DIGITS)


def _plain(rows: Float64[np.ndarray, "image _"]) -> list[list[int | float]]:
    """Return rows as lists in which whole numbers are short."""
    return [[int(each) if each.is_integer() else each for each in row] for row in rows.tolist()]


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()
