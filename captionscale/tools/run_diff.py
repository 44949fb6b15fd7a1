"""What changed between two runs."""

from collections.abc import Iterator, Sequence
from typing import Any

from captionscale import toml
from captionscale.errors import UserError
from captionscale.escape import for_html, for_shell
from captionscale.score.comparison import Comparison, compare
from captionscale.score.receipt import Receipt
from captionscale.tools.markup import notice, table
from captionscale.tools.run_artifacts import RunArtifacts


def compare_runs(ours: RunArtifacts, theirs: RunArtifacts) -> str:
    """Return what two runs differ in: settings, scores, captions, as HTML."""
    lines = list(map(notice, theirs.missing))
    if ours.config and theirs.config:
        one, other = (
            toml.flatten(run.config.model_dump(mode="json")) for run in (theirs, ours) if run.config
        )
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        rows = [
            ("setting", theirs.name, ours.name),
            *((key, _short(one.get(key)), _short(other.get(key))) for key in keys),
        ]
        lines.append(table(rows, text=True) if keys else "<p>Their settings are the same.</p>")
    pairs = [
        (first, second)
        for second in _newest(ours.receipts)
        for first in _newest(theirs.receipts)
        if first.hashes["references"] == second.hashes["references"]
    ]
    for run, its_other in ((theirs, ours), (ours, theirs)):
        if not run.receipts:
            split = next(iter(_splits(its_other)), run.config.data.val_split if run.config else "val")
            command = for_shell("captionscale", "score", str(run.folder), "--split", split)
            lines.append(
                notice(
                    f"{run.name} is not scored, so scores cannot be compared: {command}, then this report"
                    " again."
                )
            )
    if not pairs and ours.receipts and theirs.receipts:
        scored = " and ".join(f"{run.name} of {', '.join(_splits(run))}" for run in (theirs, ours))
        lines.append(
            notice(
                f"Their scores cannot be compared: those of {scored} have other references. Score both of one"
                " split, then this report again."
            )
        )
    for first, second in pairs:
        try:
            found = compare(first, second)
        except UserError as error:
            lines.append(notice(str(error)))
            continue
        lines += _compared(found, second, ours, theirs)
    return "\n".join(lines)


def _compared(found: Comparison, receipt: Receipt, ours: RunArtifacts, theirs: RunArtifacts) -> Iterator[str]:
    yield f"<h3>Scores on split {for_html(str(receipt.provenance.get('split', '?')))}, image by image</h3>"
    rows = [
        ("", theirs.name, ours.name, "difference", "its 95 % interval", "p", "images won", "lost", "tied")
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
                f"{each.won:,}",
                f"{each.lost:,}",
                f"{each.tied:,}",
            )
        )
    yield table(rows)
    yield (
        f'<p class="legend">Difference: {for_html(ours.name)} less {for_html(theirs.name)}; won: images at'
        f" which {for_html(ours.name)} scores higher. A paired bootstrap over images: an interval that leaves"
        " 0, or p below 0.05, says that the difference is not the luck of these images; it says nothing of"
        " another seed.</p>"
    )
    if found.most_changed:
        changes = [("image", f"change of {found.ranked_by}", theirs.name, ours.name)]
        changes += [
            (str(each.image_id), f"{100 * each.difference:+.1f}", *each.captions)
            for each in found.most_changed
        ]
        yield "<h3>What changed most</h3>" + table(changes, text=True)


def _newest(receipts: Sequence[Receipt]) -> list[Receipt]:
    """Return the last receipt of each set of references."""
    return list({receipt.hashes["references"]: receipt for receipt in receipts}.values())


def _splits(run: RunArtifacts) -> list[str]:
    """Return the splits that a run is scored on, the last scored one first."""
    return list(dict.fromkeys(str(each.provenance.get("split", "?")) for each in reversed(run.receipts)))


def _short(value: Any) -> str:
    return "not set" if value is None else str(value)
