"""The section of a report that compares two runs: settings, scores, captions."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from captionscale import toml
from captionscale.errors import UserError
from captionscale.html import render
from captionscale.score.comparison import compare
from captionscale.score.receipt import Receipt
from captionscale.tools.run_artifacts import RunArtifacts


def compare_runs(ours: RunArtifacts, theirs: RunArtifacts) -> Markup:
    """Return the differences between two runs as HTML."""
    notices = [*theirs.missing]
    for run, other in ((theirs, ours), (ours, theirs)):
        if not run.receipts:
            command = run.score_command(next(iter(other.scored_splits), ""))
            notices.append(
                f"{run.name} is not scored, so scores cannot be compared: run {command}, then this report"
                " again."
            )
    pairs = [
        (first, second)
        for second in _newest(ours.receipts)
        for first in _newest(theirs.receipts)
        if first.hashes["references"] == second.hashes["references"]
    ]
    if not pairs and ours.receipts and theirs.receipts:
        scored = " and ".join(f"{run.name} ({', '.join(run.scored_splits)})" for run in (theirs, ours))
        notices.append(
            f"Their scores cannot be compared: {scored} have different references. Score both on one split,"
            " then run this report again."
        )
    comparisons = []
    for first, second in pairs:
        try:
            comparisons.append(_compared(first, second, ours, theirs))
        except UserError as error:
            notices.append(str(error))
    return render(
        "report_diff.html",
        ours=ours.name,
        theirs=theirs.name,
        notices=notices,
        settings=_settings(ours, theirs),
        comparisons=comparisons,
    )


def _settings(ours: RunArtifacts, theirs: RunArtifacts) -> list[tuple[str, str, str]] | None:
    """Return the keys that differ, with both values; None if a config is missing."""
    if not (ours.config and theirs.config):
        return None
    one, other = (toml.flatten(config.model_dump(mode="json")) for config in (theirs.config, ours.config))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [(key, _shown(one.get(key)), _shown(other.get(key))) for key in keys]


def _compared(first: Receipt, second: Receipt, ours: RunArtifacts, theirs: RunArtifacts) -> dict[str, Any]:
    found = compare(first, second)
    rows: list[tuple[str, ...]] = [
        ("", theirs.name, ours.name, "difference", "95 % interval", "p", "images won", "lost", "tied")
    ]
    for each in found.differences:
        low, high = each.interval
        rows.append(
            (
                each.metric,
                f"{100 * each.first:.1f}",
                f"{100 * each.second:.1f}",
                f"{100 * each.difference:+.1f}",
                f"{100 * low:+.1f} to {100 * high:+.1f}",
                f"{each.p_value:.4f}",
                *(f"{count:,}" for count in (each.won, each.lost, each.tied)),
            )
        )
    changes = [("image", f"change of {found.ranked_by}", theirs.name, ours.name)]
    changes += [
        (str(image.image_id), f"{100 * image.difference:+.1f}", *image.captions)
        for image in found.most_changed
    ]
    return {
        "split": second.provenance.get("split", "?"),
        "rows": rows,
        "most_changed": changes if found.most_changed else [],
    }


def _newest(receipts: Sequence[Receipt]) -> list[Receipt]:
    """Return the last receipt of each set of references."""
    return list({receipt.hashes["references"]: receipt for receipt in receipts}.values())


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
