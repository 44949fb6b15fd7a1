"""Compare two systems: is the difference of their scores more than chance?"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from captionscale.errors import UserError
from captionscale.progress import spinner
from captionscale.score.intervals import bootstrap_scores, interval
from captionscale.score.metric import ComputedMetric, Metric
from captionscale.score.metrics import METRICS, Metrics, resolve
from captionscale.score.receipt import Receipt
from captionscale.score.tokenizer import INVISIBLE

RESAMPLES = 10_000
_SEED = 0
_ROUNDING = 1e-9
_TOLERANCE = 1e-6
_RANKED_BY = "CIDEr-D"


@dataclass(frozen=True)
class Difference:
    """Scores of two systems in one metric.

    Attributes:
        metric: Its name.
        first: The first system's corpus value.
        second: The second system's.
        difference: Second minus first.
        interval: The 95 % bootstrap interval of the difference.
        p_value: Two-sided: how often chance alone would separate equal systems so far.
        won: Images on which the second system scores higher.
        lost: Images on which it scores lower.
        tied: Images on which both score the same.
    """

    metric: str
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    won: int
    lost: int
    tied: int


@dataclass(frozen=True)
class Change:
    """An image on which two systems differ: second minus first, and both captions."""

    image_id: int | str
    difference: float
    captions: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """Two receipts, compared on the same images.

    Attributes:
        images: How many.
        differences: Of each metric that both have.
        ranked_by: The metric that selects `most_changed`.
        most_changed: The images that changed most, in that order.
    """

    images: int
    differences: list[Difference]
    ranked_by: str
    most_changed: list[Change]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON types."""
        return asdict(self)


def compare(first: Receipt, second: Receipt, *, top: int = 5, metrics: Metrics = ()) -> Comparison:
    """Compare two systems image by image.

    Args:
        first: One system, such as the baseline.
        second: The other.
        top: How many of the images that changed most to return.
        metrics: The user's own metrics as `module:Class`; unknown metrics of a receipt must be means.

    Raises:
        UserError: Receipts of different images, references or measurements, or of an unknown metric that is
            no mean.

    Source:
        The paired bootstrap: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
        Both systems are scored on each resample of the images. p is twice the share of resamples in which the
        difference is 0 or has the other sign, with 1 added to both counts: so it falls below 0.05 where the
        interval excludes 0, and is at least 2 / 10,001.
    """
    _check_comparable(first, second)
    known = METRICS | {metric.name: metric for metric in (resolve(metrics) if metrics else ())}
    shared = [
        known.get(name) or ComputedMetric(name, (), "") for name in first.scores if name in second.scores
    ]
    for receipt in (first, second):
        _check_values(receipt, shared)
    with spinner(f"scoring both on {RESAMPLES:,} sets of {len(first.images.ids):,} images"):
        one, other = (
            bootstrap_scores(receipt.images.statistics, shared, resamples=RESAMPLES, seed=_SEED)
            for receipt in (first, second)
        )
    names = [metric.name for metric in shared]
    differences = [_difference(name, first, second, other[name] - one[name]) for name in names]
    ranking = _RANKED_BY if _RANKED_BY in names else names[-1]
    changes = _changes(ranking, first, second)
    # Ties keep the order of the images.
    most = [int(at) for at in np.argsort(-abs(changes), kind="stable")[:top] if changes[at]]
    ids, before, after = first.images.ids, first.images.captions, second.images.captions
    return Comparison(
        images=len(changes),
        differences=differences,
        ranked_by=ranking,
        most_changed=[Change(ids[at], float(changes[at]), (before[at], after[at])) for at in most],
    )


def table(comparison: Comparison) -> list[str]:
    """Return a comparison as lines of text."""
    width = max(len(each.metric) for each in comparison.differences)
    lines = [f"{'':{width}}        A        B     B - A  95 % interval            p     won    lost    tied"]
    for each in comparison.differences:
        low, high = each.interval
        lines.append(
            f"{each.metric:{width}}{each.first:9.4f}{each.second:9.4f}{each.difference:+10.4f}"
            f"  [{low:+.4f}, {high:+.4f}]{each.p_value:8.4f}{each.won:8,}{each.lost:8,}{each.tied:8,}"
        )
    lines.append(f"{comparison.images:,} images")
    if comparison.most_changed:
        lines += ["", f"changed most, by {comparison.ranked_by}:"]
    for change in comparison.most_changed:
        # A receipt may come from anywhere, and its captions may contain control characters.
        one, other = (INVISIBLE.sub(" ", caption) for caption in change.captions)
        lines += [f"  {change.image_id}  {change.difference:+.4f}", f"    A: {one}", f"    B: {other}"]
    return lines


def find_receipt(path: Path) -> Path:
    """Return a receipt's path: the given file, or the only receipt of a run or of one of its scorings.

    Raises:
        UserError: There is none, or there are several.
    """
    if not path.is_dir():
        return path
    own = path / "receipt.json"
    found = [own] if own.is_file() else sorted(path.glob("scores/*/receipt.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"{path}: no receipt, expected one; score the run first: captionscale score {path} ..."
        )
    names = ", ".join(str(each.relative_to(path)) for each in found)
    raise UserError(f"{path}: {len(found)} receipts, expected one; name one of {names}")


def _check_comparable(first: Receipt, second: Receipt) -> None:
    ours, theirs = first.metric_signature, second.metric_signature
    for name, part in ours.items():
        if theirs.get(name, part) != part:
            raise UserError(
                f"compare: the first receipt has '{part}', the second '{theirs[name]}'; expected scores of"
                " the same images, measured in the same way; score both again against the same references"
            )
    if first.images.ids != second.images.ids:
        raise UserError(
            "compare: the receipts are of different images, expected the same; score both on one split"
        )
    if not first.scores.keys() & second.scores.keys():
        raise UserError("compare: the receipts share no metric, expected one or more; score both by the same")


def _check_values(receipt: Receipt, metrics: Iterable[Metric]) -> None:
    """Verify that the metrics are those that scored a receipt: its statistics give its scores."""
    for metric in metrics:
        rows = receipt.images.statistics[metric.family]
        if rows.shape[1] != metric.width or not np.isclose(
            metric.corpus_value(rows), receipt.scores[metric.name], rtol=_TOLERANCE, atol=_TOLERANCE
        ):
            raise UserError(
                f"compare: found {metric.name} = {receipt.scores[metric.name]:g}, expected what the receipt's"
                " statistics give; name the metric by --metric MODULE:CLASS, or score both again"
            )


def _changes(metric: str, first: Receipt, second: Receipt) -> Float64[np.ndarray, "image"]:
    """Return each image's difference; rounding errors are none."""
    changes = second.images.scores[metric] - first.images.scores[metric]
    return np.where(abs(changes) < _ROUNDING, 0, changes)


def _difference(
    metric: str, first: Receipt, second: Receipt, resampled: Float64[np.ndarray, "resample"]
) -> Difference:
    one, other = first.scores[metric], second.scores[metric]
    by_image = _changes(metric, first, second)
    return Difference(
        metric=metric,
        first=one,
        second=other,
        difference=other - one,
        interval=interval(resampled),
        p_value=p_value(resampled),
        won=int((by_image > 0).sum()),
        lost=int((by_image < 0).sum()),
        tied=int((by_image == 0).sum()),
    )


def p_value(differences: Float64[np.ndarray, "resample"]) -> float:
    """Return the two-sided p-value that matches the percentile interval of resampled differences."""
    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(differences) + 1))
