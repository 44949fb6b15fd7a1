"""Is one system better than another, or were the images kind to it?"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from captionscale.errors import UserError
from captionscale.progress import spinner
from captionscale.score.intervals import bootstrap_scores, interval
from captionscale.score.receipt import Receipt
from captionscale.score.tokenizer import INVISIBLE

RESAMPLES = 10_000
_SEED = 0
_ROUNDING = 1e-9
_RANKING = "CIDEr-D"


@dataclass(frozen=True)
class Difference:
    """What two systems have of one metric.

    Attributes:
        metric: Its name.
        first: The first one's corpus figure.
        second: The second one's.
        difference: Second less first.
        interval: Where 95 % of the differences on other sets of images lie.
        p_value: How often chance alone would part two equals so far, in either direction.
        won: Images at which the second one scores higher.
        lost: At which lower.
        tied: At which both score the same.
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
    """An image at which two systems differ.

    Attributes:
        image_id: Its id.
        difference: Of its own figure, second less first.
        captions: The first one's and the second one's.
    """

    image_id: int | str
    difference: float
    captions: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """Two receipts, compared on the same images.

    Attributes:
        images: How many.
        differences: Of each metric that both have.
        ranked_by: The metric by which `most_changed` is chosen.
        most_changed: The images that changed most, the most first.
    """

    images: int
    differences: list[Difference]
    ranked_by: str
    most_changed: list[Change]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def compare(first: Receipt, second: Receipt, *, top: int = 5) -> Comparison:
    """Compare two systems image by image.

    Args:
        first: One of them, such as the baseline.
        second: The other one.
        top: How many of the images that changed most.

    Raises:
        UserError: They are not of the same images and references, or not measured in the same way.

    Source:
        The paired bootstrap: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
        Both systems are scored on each resample of the images.  p is twice the share of resamples in which
        the difference is 0 or on the other side, each of both counts having one added: so it falls below
        0.05 where the interval leaves 0, and is never below 2 / 10,001.
    """
    _refuse_unlike(first, second)
    metrics = [metric for metric in first.scores if metric in second.scores]
    with spinner(f"scoring both on {RESAMPLES:,} sets of {len(first.images.ids):,} images"):
        resamples = [
            bootstrap_scores(receipt.images.statistics, metrics, resamples=RESAMPLES, seed=_SEED)
            for receipt in (first, second)
        ]
    differences = [
        _difference(metric, first, second, resamples[1][metric] - resamples[0][metric]) for metric in metrics
    ]
    ranking = _RANKING if _RANKING in metrics else metrics[-1]
    changes = _changes(ranking, first, second)
    # Ties keep the order of the images.
    most = [int(at) for at in np.argsort(-abs(changes), kind="stable")[:top] if changes[at]]
    return Comparison(
        images=len(changes),
        differences=differences,
        ranked_by=ranking,
        most_changed=[
            Change(
                first.images.ids[at],
                float(changes[at]),
                (first.images.captions[at], second.images.captions[at]),
            )
            for at in most
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
        # A receipt may come from anywhere, and its captions may hold what moves the cursor.
        one, other = (INVISIBLE.sub(" ", caption) for caption in change.captions)
        lines += [f"  {change.image_id}  {change.difference:+.4f}", f"    A: {one}", f"    B: {other}"]
    return lines


def find_receipt(path: Path) -> Path:
    """Return the receipt that a path means: itself, or the one of a run's folder or of one of its scorings.

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
        raise UserError(f"{path}: no receipt, wanted one; score the run first: captionscale score {path} ...")
    names = ", ".join(str(each.relative_to(path)) for each in found)
    raise UserError(f"{path}: {len(found)} receipts, wanted one; name one of {names}")


def _refuse_unlike(first: Receipt, second: Receipt) -> None:
    ours, theirs = first.metric_signature, second.metric_signature
    for name, part in ours.items():
        if theirs.get(name, part) != part:
            raise UserError(
                f"compare: the first receipt has '{part}', the second '{theirs[name]}'; wanted scores of the"
                " same images, measured in the same way; score both again against the same references"
            )
    if first.images.ids != second.images.ids:
        raise UserError(
            "compare: the receipts are of different images, wanted the same; score both on one split"
        )
    if not first.scores.keys() & second.scores.keys():
        raise UserError("compare: the receipts share no metric, wanted one or more; score both by the same")


def _changes(metric: str, first: Receipt, second: Receipt) -> Float64[np.ndarray, "image"]:
    """Return by how much each image's figure rose; two ways of adding up are no difference."""
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
    """Return the two-sided p-value that belongs to the percentile interval of resampled differences."""
    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(differences) + 1))
