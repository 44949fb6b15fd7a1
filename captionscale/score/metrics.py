"""The metrics, and an evaluator that computes them like the COCO leaderboard, to the last digit, but faster.

Source:
    Chen et al. 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server" (arXiv:1504.00325),
    whose code is the package pycocoevalcap. captionscale starts its Java programs itself: pycocoevalcap's
    wrappers write into site-packages, hang when Java dies, and move captions to other images when one of
    them contains a line separator.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64

from captionscale import plugins
from captionscale.errors import UserError, describe_images, did_you_mean
from captionscale.machine import cpu_count
from captionscale.score.bleu import Bleu
from captionscale.score.ciderd import CiderD
from captionscale.score.meteor import DEFAULT_GB, Meteor
from captionscale.score.metric import Metric
from captionscale.score.rouge import RougeL
from captionscale.score.tokenizer import tokenize

# A new metric of captionscale is one line here.
METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (*map(Bleu, range(1, 5)), Meteor(), RougeL(), CiderD())
}
"""captionscale's metrics by name, in the order of tables."""

Metrics: TypeAlias = Collection[str | Metric]
"""Names of `METRICS`, a user's own as `module:Class`, or objects."""

MetricScores: TypeAlias = tuple[float, Sequence[float]]
"""The corpus value of a metric and those of the images."""

_MAX_WORDS = 5000


@dataclass(frozen=True)
class Scores:
    """Scores of captions."""

    metrics: list[Metric]
    values: dict[str, float]
    """The corpus value of each metric."""
    image_ids: list[int]
    """In ascending order."""
    per_image: dict[str, list[float]]
    """The values of each metric for each image."""
    statistics: dict[str, Float64[np.ndarray, "image _"]]
    """Of each family of metrics; see `Metric.statistics`."""
    reference_implementation: bool
    """Whether pycocoevalcap's own classes computed the values."""


class Evaluator:
    """Scores captions repeatedly: METEOR's JVMs stay warm, and each reference is tokenized once."""

    def __init__(
        self,
        *,
        workers: int | None = None,
        meteor_gb: float = DEFAULT_GB,
        reference_implementation: bool = False,
        once: bool = False,
    ):
        """Start no process yet.

        Args:
            workers: Maximum number of METEOR's JVMs; default: one for each core.
            meteor_gb: Their memory together; fewer are started if it is short.
            reference_implementation: Use pycocoevalcap's own classes, and METEOR as one JVM with its whole
                paraphrase table: slower, with the same values.
            once: Other captions won't follow, so METEOR needn't be ready for them.
        """
        self._reference_implementation = reference_implementation
        self._meteor = Meteor(
            workers=workers or cpu_count(), gb=meteor_gb, full=reference_implementation, once=once
        )
        self._tokenized: dict[str, str] = {}

    def __enter__(self) -> "Evaluator":
        """Return the evaluator."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the JVMs; the next call of `measure` starts new ones."""
        self._meteor.close()

    def measure(
        self,
        captions: Mapping[int, str],
        references: Mapping[int, Sequence[str]],
        metrics: Metrics = tuple(METRICS),
    ) -> Scores:
        """Score one caption for each image against its references.

        The order of the images does not matter. An empty caption scores 0, except that ROUGE-L is 1 if a
        reference is empty too. Only CIDEr-D depends on other images, whose references give its document
        frequencies; a single image scores 0.

        Args:
            captions: The caption of each image.
            references: One or more for each image.
            metrics: Which metrics to compute.

        Raises:
            UserError: Captions and references of different images, no image, an image without a reference,
                only empty references, a text of more than 5,000 words, an unknown metric, or a Java program
                failed.
        """
        chosen = [self._meteor if metric is METRICS["METEOR"] else metric for metric in resolve(metrics)]
        _check(captions, references)
        # Sorted, because a sum of floats depends on the order.
        image_ids = sorted(references)
        candidates, targets = self._tokenize(
            [captions[image_id] for image_id in image_ids], [references[image_id] for image_id in image_ids]
        )
        _check_lengths(image_ids, candidates, targets)
        if not any(map(any, targets)):
            raise UserError(
                f"score: found no word in the references of {len(image_ids)} images, expected sentences;"
                " give human captions as references"
            )
        statistics = self._statistics(chosen, candidates, targets)
        values: dict[str, float] = {}
        per_image: dict[str, list[float]] = {}
        for metric in chosen:
            rows = statistics[metric.family]
            # A metric of the user's own may return a NumPy number.
            values[metric.name] = float(metric.corpus_value(rows))
            per_image[metric.name] = metric.corpus_score(rows).tolist()
        if self._reference_implementation:
            own = pycocoevalcap_scores(
                dict(enumerate([text] for text in candidates)), dict(enumerate(targets)), list(values)
            )
            if self._meteor in chosen:
                own["METEOR"] = self._meteor.reference(statistics["METEOR"])
            for name, (value, of_images) in own.items():
                values[name], per_image[name] = float(value), [float(each) for each in of_images]
        return Scores(chosen, values, image_ids, per_image, statistics, self._reference_implementation)

    def _tokenize(
        self, captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[list[str], list[list[str]]]:
        """Return tokenized texts; known references are not tokenized again."""
        new = list({text: None for group in references for text in group if text not in self._tokenized})
        tokenized = tokenize([*captions, *new])
        self._tokenized.update(zip(new, tokenized[len(captions) :], strict=True))
        return tokenized[: len(captions)], [[self._tokenized[text] for text in group] for group in references]

    def _statistics(
        self, metrics: Sequence[Metric], candidates: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Float64[np.ndarray, "image _"]]:
        """Return the statistics of each family; external metrics are computed while the others are."""
        families = {metric.family: metric for metric in metrics}
        self._meteor.open()
        with ThreadPoolExecutor(1) as thread:
            try:
                waiting = {
                    family: thread.submit(metric.statistics, candidates, references)
                    for family, metric in families.items()
                    if metric.external
                }
                found = {
                    family: metric.statistics(candidates, references)
                    for family, metric in families.items()
                    if not metric.external
                }
                found |= {family: each.result() for family, each in waiting.items()}
            except BaseException:
                # The thread waits for JVMs.
                for metric in metrics:
                    metric.close()
                raise
        for family, metric in families.items():
            if found[family].shape != (len(candidates), metric.width) or not np.isfinite(found[family]).all():
                raise UserError(
                    f"{metric.name}: found statistics of shape {found[family].shape}, expected finite ones of"
                    f" shape ({len(candidates)}, {metric.width}); correct {type(metric).__name__}.statistics"
                )
        return found


def measure(
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    metrics: Metrics = tuple(METRICS),
    **options: Any,
) -> Scores:
    """Score captions once, as `Evaluator.measure`; the options are the evaluator's."""
    with Evaluator(once=True, **options) as evaluator:
        return evaluator.measure(captions, references, metrics)


def resolve(metrics: Metrics) -> list[Metric]:
    """Return metrics from names.

    Raises:
        UserError: No list, or one with an unknown name, or a class that cannot be imported.
    """
    if not metrics or isinstance(metrics, str):
        raise UserError(f"score: metrics = {metrics!r}, expected a list of some of {', '.join(METRICS)}")
    found: list[Metric] = []
    for metric in metrics:
        if isinstance(metric, Metric):
            found.append(metric)
        elif plugins.is_plugin(metric):
            found.append(plugins.load(metric, Metric)())  # type: ignore[type-abstract]
        elif metric in METRICS:
            found.append(METRICS[metric])
        else:
            raise UserError(
                f"score: unknown metric {metric!r}, expected a known one or MODULE:CLASS;"
                f" {did_you_mean(metric, METRICS)}"
            )
    return found


def _check(captions: Collection[int], references: Mapping[int, Sequence[str]]) -> None:
    faults = {
        "without a caption": references.keys() - captions,
        "not among the references": set(captions) - references.keys(),
        "without a reference": [image_id for image_id, texts in references.items() if not texts],
        "with a str instead of a list of references": [
            image_id for image_id, texts in references.items() if isinstance(texts, str)
        ],
    }
    found = ", ".join(f"{describe_images(sorted(ids))} {fault}" for fault, ids in faults.items() if ids)
    if found or not references:
        raise UserError(
            f"score: found {found or 'no images'}; expected one caption and at least one reference for"
            " each image; give both for the same split"
        )


def _check_lengths(
    image_ids: Sequence[int], candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Refuse texts that would take hours: the time grows with the product of their lengths."""
    for image_id, caption, group in zip(image_ids, candidates, references, strict=True):
        words = 1 + max(text.count(" ") for text in (caption, *group))
        if words > _MAX_WORDS:
            raise UserError(
                f"score: a text of image {image_id} has {words:,} words, expected at most {_MAX_WORDS:,};"
                " it can be no caption: correct it"
            )


def pycocoevalcap_scores(
    captions: dict[int, list[str]], references: dict[int, list[str]], metrics: Sequence[str] = tuple(METRICS)
) -> dict[str, MetricScores]:
    """Return the corpus and per-image values of BLEU, ROUGE-L and CIDEr-D from pycocoevalcap's own classes.

    Args:
        captions: Tokenized, one for each image.
        references: Tokenized, of the same images in the same order.
        metrics: Names; those of other metrics are ignored.
    """
    # Imported here: they load the Python debugger.
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scores: dict[str, MetricScores] = {}
    if any(name.startswith("BLEU") for name in metrics):
        bleus = Bleu(4).compute_score(references, captions, verbose=0)
        scores = {f"BLEU-{n}": result for n, result in enumerate(zip(*bleus, strict=True), start=1)}
    if "ROUGE-L" in metrics:
        scores["ROUGE-L"] = Rouge().compute_score(references, captions)
    if "CIDEr-D" in metrics:
        scores["CIDEr-D"] = Cider().compute_score(references, captions)
    return {name: scores[name] for name in metrics if name in scores}
