"""Compare two systems: is the difference of their scores more than chance?"""

from dataclasses import dataclass
from pathlib import Path

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
_ROUNDING = 1e-9
_TOLERANCE = 1e-6
_RANKED_BY = "CIDEr-D"


@dataclass(frozen=True)
class Difference:
    """Corpus values of two systems in one metric; the difference is second minus first."""

    metric: str
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    """The 95 % bootstrap interval of the difference."""
    p_value: float
    """Two-sided."""
    won: int
    """Images on which the second system scores higher; `lost`: lower."""
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
    """Two receipts, compared on the same images."""

    images: int
    """How many."""
    differences: list[Difference]
    """Of each metric that both have."""
    ranked_by: str
    """The metric that selects `most_changed`."""
    most_changed: list[Change]
    """The images that changed most, in that order."""


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
    _check_measured_alike(first, second)
    known = METRICS | {metric.name: metric for metric in (resolve(metrics) if metrics else ())}
    shared = [
        known.get(name) or ComputedMetric(name, (), "") for name in first.scores if name in second.scores
    ]
    if not shared:
        raise UserError("compare: the receipts share no metric, expected one or more; score both by the same")
    for metric in shared:
        _check_values(first, metric)
        _check_values(second, metric)
    with spinner(f"scoring both on {RESAMPLES:,} sets of {len(first.images.ids):,} images"):
        one, other = (
            bootstrap_scores(receipt.images.statistics, shared, resamples=RESAMPLES)
            for receipt in (first, second)
        )
    ids, before, after = first.images.ids, first.images.captions, second.images.captions
    changes = {name: _changes(name, first, second) for name in one}
    ranking = _RANKED_BY if _RANKED_BY in one else list(one)[-1]
    # Ties keep the order of the images.
    ranked = np.argsort(-abs(changes[ranking]), kind="stable")
    return Comparison(
        images=len(ids),
        differences=[
            Difference(
                metric=name,
                first=first.scores[name],
                second=second.scores[name],
                difference=second.scores[name] - first.scores[name],
                interval=interval(other[name] - one[name]),
                p_value=p_value(other[name] - one[name]),
                won=int((of_images > 0).sum()),
                lost=int((of_images < 0).sum()),
                tied=int((of_images == 0).sum()),
            )
            for name, of_images in changes.items()
        ],
        ranked_by=ranking,
        most_changed=[
            Change(ids[at], float(changes[ranking][at]), (before[at], after[at]))
            for at in map(int, ranked[:top])
            if changes[ranking][at]
        ],
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


def _check_measured_alike(first: Receipt, second: Receipt) -> None:
    theirs = second.metric_signature
    for name, part in first.metric_signature.items():
        if theirs.get(name, part) != part:
            raise UserError(
                f"compare: the first receipt has '{part}', the second '{theirs[name]}'; expected scores of"
                " the same images, measured in the same way; score both again against the same references"
            )
    if first.images.ids != second.images.ids:
        raise UserError(
            "compare: the receipts are of different images, expected the same; score both on one split"
        )


def _check_values(receipt: Receipt, metric: Metric) -> None:
    """Verify that a receipt's statistics give its score, so that this metric measured it."""
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


def p_value(differences: Float64[np.ndarray, "resample"]) -> float:
    """Return the two-sided p-value that matches the percentile interval of resampled differences."""
    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(differences) + 1))
