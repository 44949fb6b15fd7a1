"""Score captions against references, digit for digit as the COCO leaderboard does, and many times faster.

Source:
    Chen et al. 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server" (arXiv:1504.00325);
    its code is the package pycocoevalcap.  Its PTB tokenizer and METEOR are Java programs, which we start
    ourselves: its wrappers write into site-packages, hang when Java dies, and move captions to other images
    when one of them holds a line separator.  BLEU, ROUGE-L and CIDEr-D are of our own
    kernels or, on request, of its classes.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from jaxtyping import Float, Float64

from captionscale.errors import UserError, describe_images, did_you_mean
from captionscale.machine import cpu_count
from captionscale.score import bleu, ciderd, meteor, rouge
from captionscale.score.tokenizer import tokenize

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")

_MOST_WORDS = 5000

# Of a metric the corpus figure and those of the images.
MetricScores = tuple[float, Sequence[float]]


@dataclass(frozen=True)
class Scores:
    """What was measured.

    Attributes:
        values: The corpus figure of each metric, 0 to 1 (CIDEr-D: 0 to 10).
        image_ids: The images, in ascending order.
        per_image: The figures of each metric for each image, in the order of `image_ids`.
        statistics: Of each family of metrics (the four of BLEU are one) a row for each image. `corpus_score` makes
            the figure of any images, repeated ones too, from the sum of their rows.
        reference_implementation: Whether pycocoevalcap's own classes made the figures.
    """

    values: dict[str, float]
    image_ids: list[int]
    per_image: dict[str, list[float]]
    statistics: dict[str, Float64[np.ndarray, "image _"]]
    reference_implementation: bool = False


class Evaluator:
    """Scores captions again and again: METEOR's JVMs stay warm, and each reference is tokenized once."""

    def __init__(
        self,
        *,
        workers: int | None = None,
        meteor_gb: float = meteor.DEFAULT_GB,
        reference_implementation: bool = False,
    ):
        """Start nothing yet.

        Args:
            workers: JVMs of METEOR, at most; none: one for each core.
            meteor_gb: Memory of these together; fewer are started where it is short.
            reference_implementation: Take pycocoevalcap's own classes, and METEOR as one JVM with its whole
                table of paraphrases: slower, and the same to the last digit.
        """
        self._reference_implementation = reference_implementation
        self._meteor = meteor.Meteor(
            workers=workers or cpu_count(), gb=meteor_gb, full=reference_implementation
        )
        self._tokenized: dict[str, str] = {}

    def __enter__(self) -> "Evaluator":
        """Return it as it is."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the JVMs."""
        self.close()

    def close(self) -> None:
        """End the JVMs; the next measurement starts new ones."""
        self._meteor.close()

    def measure(
        self,
        captions: Mapping[int, str],
        references: Mapping[int, Sequence[str]],
        metrics: Sequence[str] = METRICS,
        *,
        once: bool = False,
    ) -> Scores:
        """Score one caption for each image against what people wrote about it.

        The order of the images does not matter.  An empty caption scores 0, but ROUGE-L gives it 1 where a
        reference has no word either.  CIDEr-D alone depends on the other images, whose references say how
        rare a word is; a lone image has 0, since no word is rarer than another.

        Args:
            captions: The caption of each image.
            references: The human captions of each image, any number from one up.
            metrics: Which of `METRICS` to compute.
            once: No other captions will follow, so that METEOR need not be ready for them.

        Returns:
            The figures over all images and for each one.

        Raises:
            UserError: The images of both differ, or there are none, an image has no reference, no reference
                has a word, a text has more than 5,000, a metric is unknown, or a Java program failed.
        """
        _check(captions, references, metrics)
        # Sorted, because a sum of floats depends on its order.
        image_ids = sorted(references)
        candidates, targets = self._tokenize(
            [captions[image_id] for image_id in image_ids], [references[image_id] for image_id in image_ids]
        )
        _refuse_endless(image_ids, candidates, targets)
        if not any(map(any, targets)):
            raise UserError(
                f"score: found no word in the references of {len(image_ids)} images, wanted sentences;"
                " give the human captions as references"
            )
        figures: dict[str, MetricScores] = {}
        statistics: dict[str, Float64[np.ndarray, "image _"]] = {}
        self._meteor.open()
        with ThreadPoolExecutor(1) as beside:
            if "METEOR" in metrics:
                waiting = beside.submit(self._meteor.measure, candidates, targets, once=once)
            try:
                _n_gram_metrics(candidates, targets, metrics, figures, statistics)
                if self._reference_implementation:
                    found = {number: [caption] for number, caption in enumerate(candidates)}
                    figures |= pycocoevalcap_scores(found, dict(enumerate(targets)), metrics)
                if "METEOR" in metrics:
                    value, per_image, statistics["METEOR"] = waiting.result()
                    figures["METEOR"] = value, per_image.tolist()
            except BaseException:
                # The thread beside waits for the JVMs.
                self.close()
                raise
        return Scores(
            values={metric: float(figures[metric][0]) for metric in metrics},
            image_ids=image_ids,
            per_image={metric: [float(figure) for figure in figures[metric][1]] for metric in metrics},
            statistics=statistics,
            reference_implementation=self._reference_implementation,
        )

    def _tokenize(
        self, captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[list[str], list[list[str]]]:
        """Return both as words; of the references only new ones have yet to be tokenized."""
        new = list({text: None for group in references for text in group if text not in self._tokenized})
        tokenized = tokenize([*captions, *new])
        self._tokenized.update(zip(new, tokenized[len(captions) :], strict=True))
        return tokenized[: len(captions)], [[self._tokenized[text] for text in group] for group in references]


def measure(
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    metrics: Sequence[str] = METRICS,
    *,
    workers: int | None = None,
    meteor_gb: float = meteor.DEFAULT_GB,
    reference_implementation: bool = False,
) -> Scores:
    """Score captions once: see `Evaluator`, whose options these are, and its `measure`."""
    with Evaluator(
        workers=workers, meteor_gb=meteor_gb, reference_implementation=reference_implementation
    ) as evaluator:
        return evaluator.measure(captions, references, metrics, once=True)


def family(metric: str) -> str:
    """Return the name under which `Scores.statistics` has what a metric is made of."""
    return "BLEU" if metric.startswith("BLEU") else metric


def corpus_score(metric: str, sums: Float[np.ndarray, "*any _"]) -> Float64[np.ndarray, "*any"]:
    """Return a metric's figure of any images, of the sum of their rows of `Scores.statistics`."""
    if metric == "METEOR":
        return meteor.corpus_score(sums)
    if family(metric) == "BLEU":
        return np.asarray(bleu.corpus_score(sums)[..., int(metric[-1]) - 1])
    return np.asarray(sums[..., 0] / sums[..., 1])


def _check(
    captions: Collection[int], references: Mapping[int, Sequence[str]], metrics: Sequence[str]
) -> None:
    if not metrics or isinstance(metrics, str):
        raise UserError(f"score: metrics = {metrics!r}, wanted a list of some of {', '.join(METRICS)}")
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"score: unknown metric {metric!r}; {did_you_mean(metric, METRICS)}")
    faults = {
        "without a caption": references.keys() - captions,
        "not among the references": set(captions) - references.keys(),
        "without a reference": [image_id for image_id, texts in references.items() if not texts],
        "with one bare text for a list of references": [
            image_id for image_id, texts in references.items() if isinstance(texts, str)
        ],
    }
    found = ", ".join(f"{describe_images(sorted(ids))} {fault}" for fault, ids in faults.items() if ids)
    if found or not references:
        raise UserError(
            f"score: found {found or 'no images at all'}; wanted one caption and at least one reference for"
            " each image; give both for the same split"
        )


def _refuse_endless(
    image_ids: Sequence[int], candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Refuse what would take hours: the time of a pair of texts goes with the product of their lengths."""
    for image_id, caption, group in zip(image_ids, candidates, references, strict=True):
        words = 1 + max(text.count(" ") for text in (caption, *group))
        if words > _MOST_WORDS:
            raise UserError(
                f"score: a text of image {image_id} has {words:,} words, wanted at most {_MOST_WORDS:,};"
                " it can be no caption: correct it"
            )


def _n_gram_metrics(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    figures: dict[str, MetricScores],
    statistics: dict[str, Float64[np.ndarray, "image _"]],
) -> None:
    """Add our figures, and what they are made of, to what there is."""
    if any(family(metric) == "BLEU" for metric in metrics):
        rows = statistics["BLEU"] = bleu.statistics(candidates, references)
        table = zip(bleu.corpus_score(rows.sum(0)), bleu.corpus_score(rows).T, strict=True)
        figures |= {
            f"BLEU-{n}": (float(value), per_image.tolist()) for n, (value, per_image) in enumerate(table, 1)
        }
    for metric, kernel in (("ROUGE-L", rouge.rouge_l), ("CIDEr-D", ciderd.cider_d)):
        if metric in metrics:
            per_image = kernel(candidates, references)
            figures[metric] = float(per_image.mean()), per_image.tolist()
            statistics[metric] = np.stack([per_image, np.ones_like(per_image)], axis=1)


def pycocoevalcap_scores(
    captions: dict[int, list[str]], references: dict[int, list[str]], metrics: Sequence[str] = METRICS
) -> dict[str, MetricScores]:
    """Return BLEU, ROUGE-L and CIDEr-D by pycocoevalcap's own classes.

    Args:
        captions: Tokenized, one for each image.
        references: Tokenized, of the same images in the same order.
        metrics: Which of `METRICS`; METEOR is none of these.
    """
    # Imported here: they load the Python debugger.
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    figures: dict[str, MetricScores] = {}
    if any(family(metric) == "BLEU" for metric in metrics):
        bleus = Bleu(4).compute_score(references, captions, verbose=0)
        figures |= {f"BLEU-{n}": result for n, result in enumerate(zip(*bleus, strict=True), start=1)}
    if "ROUGE-L" in metrics:
        figures["ROUGE-L"] = Rouge().compute_score(references, captions)
    if "CIDEr-D" in metrics:
        figures["CIDEr-D"] = Cider().compute_score(references, captions)
    return figures
