"""Bootstrap intervals: how much a score depends on the choice of images."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int

from captionscale.score.metric import Metric

CONFIDENCE = 0.95
RESAMPLES = 1000
SEED = 0
# Weights in memory, of 8 bytes each.
_MAX_WEIGHTS = 1 << 22


def bootstrap_scores(
    statistics: Mapping[str, Float64[np.ndarray, "image _"]],
    metrics: Sequence[Metric],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Float64[np.ndarray, "resample"]]:
    """Return each metric's corpus value on resamples of the images, drawn with replacement.

    For one seed and number of images, resample k holds the same images whatever the captions, so scores of
    two systems can be subtracted.

    Args:
        statistics: Of each family of metrics, images in one order.
        metrics: Which values to compute.
        resamples: How many sets of images.
        seed: Of the draws.

    Source:
        Efron & Tibshirani 1993, "An Introduction to the Bootstrap"; Koehn 2004, "Statistical Significance
        Tests for Machine Translation Evaluation". Each value is exact, except that CIDEr-D keeps the document
        frequencies of all images.
    """
    families = list(dict.fromkeys(metric.family for metric in metrics))
    columns = np.concatenate([statistics[name] for name in families], axis=1)
    ends = np.cumsum([statistics[name].shape[1] for name in families])
    sums = np.concatenate([weights @ columns for weights in _weights(len(columns), resamples, seed)])
    parts = dict(zip(families, np.split(sums, ends[:-1], axis=1), strict=True))
    return {metric.name: metric.corpus_score(parts[metric.family]) for metric in metrics}


def interval(scores: Float64[np.ndarray, "resample"]) -> tuple[float, float]:
    """Return the bounds of the central 95 % of the scores: the percentile bootstrap interval.

    They are rounded to six decimals, because the last digits of a sum depend on the machine.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return round(float(low), 6), round(float(high), 6)


def _weights(images: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, "resample image"]]:
    """Yield how often each resample holds each image, some resamples at a time."""
    random = np.random.default_rng(seed)
    step = max(1, _MAX_WEIGHTS // images)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = random.integers(images, size=(count, images))
        drawn += images * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
