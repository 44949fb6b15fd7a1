"""How far a score would move with other images: the bootstrap."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int

from captionscale.score.metrics import corpus_score, family

CONFIDENCE = 0.95
RESAMPLES = 1000
_AT_ONCE = 1 << 22
"""Most weights in memory, 8 bytes each."""

Statistics = Mapping[str, Float64[np.ndarray, "image _"]]
"""Of each family of metrics: what its corpus figures are functions of, once it is summed over images."""


def bootstrap_scores(
    statistics: Statistics, metrics: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Float64[np.ndarray, "resample"]]:
    """Return each metric's corpus figure over many sets of images, drawn from these with replacement.

    With the same seed and number of images, resample k holds the same images for whatever captions: figures
    of two systems can be subtracted.

    Args:
        statistics: Of each family that `metrics` needs, images in one order.
        metrics: Whose figures.
        resamples: How many sets.
        seed: Of the draws.

    Source:
        Efron & Tibshirani 1993, "An Introduction to the Bootstrap"; Koehn 2004, "Statistical Significance
        Tests for Machine Translation Evaluation".  Each figure is exact, BLEU's and METEOR's included.  Only
        CIDEr-D's document frequencies stay those of all images: they belong to the measure.
    """
    families = list(dict.fromkeys(map(family, metrics)))
    columns = np.concatenate([statistics[name] for name in families], axis=1)
    ends = np.cumsum([statistics[name].shape[1] for name in families])
    sums = np.concatenate([weights @ columns for weights in _weights(len(columns), resamples, seed)])
    parts = dict(zip(families, np.split(sums, ends[:-1], axis=1), strict=True))
    return {metric: corpus_score(metric, parts[family(metric)]) for metric in metrics}


def interval(figures: Float64[np.ndarray, "resample"]) -> tuple[float, float]:
    """Return the bounds between which 95 % of the figures lie: the percentile bootstrap's interval.

    They are rounded to six decimals: the last digits of a sum depend on the machine, and these must not.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(figures, [tail, 1 - tail])
    return round(float(low), 6), round(float(high), 6)


def _weights(images: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, "resample image"]]:
    """Yield how often each resample holds each image, a few resamples at a time."""
    random = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // images)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = random.integers(images, size=(count, images))
        drawn += images * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
