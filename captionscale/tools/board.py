"""A static page that compares receipts with each other and with published scores."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonpath, realpath
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from captionscale.errors import UserError
from captionscale.files import atomic_write, check_writable
from captionscale.html import render
from captionscale.progress import say
from captionscale.score.metrics import METRICS
from captionscale.score.receipt import Receipt
from captionscale.tools.published import EVIDENCE, published
from captionscale.version import __version__

TIE = "≈\u202f"
# Of each of the diagnostics: the share of captions above which it is flagged, and the text of the flag.
_FLAGGED_ABOVE = {
    "empty": (0.01, "are empty"),
    "dangling_endings": (0.10, "end in 'a', 'with' or the like"),
    "repeated_words": (0.05, "have a word twice in a row"),
    "repeated_3_grams": (0.05, "have the same three words twice"),
}


class Entry(NamedTuple):
    """A receipt and its name on the board."""

    name: str
    receipt: Receipt


@dataclass
class Table:
    """Receipts that may be ranked together: of the same references, measured in the same way."""

    references_sha256: str
    metric_signature: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    @property
    def signature(self) -> str:
        """The metric signature in one line."""
        return " | ".join(self.metric_signature.values())

    @property
    def metrics(self) -> list[str]:
        """Metrics of any receipt, in the order of columns."""
        found = {metric for entry in self.entries for metric in entry.receipt.scores}
        return [*(metric for metric in METRICS if metric in found), *sorted(found.difference(METRICS))]

    @property
    def ranked_by(self) -> str:
        """The metric that sorts the table at first."""
        return ranking_metric(self.metrics)

    @property
    def title(self) -> str:
        """The split's published name, or that in the receipts."""
        if split := published().find_split(self.references_sha256):
            return published().splits[split].title
        splits = [entry.receipt.provenance.get("split") for entry in self.entries]
        names = {str(split) for split in splits if split is not None}
        return f"Split {' / '.join(sorted(names))}" if names else "Other references"

    def accepts(self, receipt: Receipt) -> bool:
        """Return whether references are the same, and no part that both signatures have differs."""
        ours, theirs = self.metric_signature, receipt.metric_signature
        return receipt.hashes["references"] == self.references_sha256 and all(
            ours[part] == theirs[part] for part in ours.keys() & theirs.keys()
        )


def write_board(places: Sequence[Path], out: Path) -> list[Table]:
    """Write a page of receipts, and of those in folders; return its tables.

    It needs no other file and no network, and JavaScript only to sort by another column. Broken receipts are
    left out and named on standard error.

    Raises:
        UserError: No valid receipt, or a page that cannot be written.
    """
    check_writable(out)
    tables = group_into_tables(_read(places, out))
    receipts = sum(len(table.entries) for table in tables)
    write_page(out, "board.html", receipts=receipts, tables=[section(table) for table in tables], tie=TIE)
    return tables


def write_page(out: Path, template: str, **values: Any) -> int:
    """Render a template into a file; return its size in bytes."""
    # A file name may contain bytes that are no text.
    page = render(template, version=__version__, **values).encode(errors="replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(page)
    return len(page)


def ranking_metric(metrics: Sequence[str]) -> str:
    """Return the metric that ranks receipts with these metrics."""
    return "CIDEr-D" if "CIDEr-D" in metrics else metrics[-1]


def interval_text(bounds: tuple[float, float]) -> str:
    """Return an interval of a score, times 100."""
    low, high = bounds
    return f"{100 * low:.1f} to {100 * high:.1f}"


def group_into_tables(entries: Iterable[Entry]) -> list[Table]:
    """Group receipts that may be ranked together, and rank them."""
    tables: list[Table] = []
    # By name, because the first of two tables that accept a receipt takes it, in any order of arguments.
    for entry in sorted(entries, key=lambda entry: entry.name):
        receipt = entry.receipt
        table = next((table for table in tables if table.accepts(receipt)), None)
        if table is None:
            table = Table(receipt.hashes["references"])
            tables.append(table)
        table.metric_signature |= receipt.metric_signature
        table.entries.append(entry)
    for table in tables:
        by = table.ranked_by
        table.entries.sort(key=lambda entry: -entry.receipt.scores.get(by, float("-inf")))
    tables.sort(key=lambda it: (-len(it.entries), it.title, sorted(it.metric_signature.values())))
    return tables


def section(table: Table) -> Markup:
    """Return a table with its legend as HTML."""
    split = published().find_split(table.references_sha256)
    groups = published().groups(split) if split else {}
    published_metrics = {metric for rows in groups.values() for row in rows for metric in row.scores}
    metrics = table.metrics + sorted(published_metrics.difference(table.metrics))
    return render(
        "board_table.html",
        table=table,
        metrics=metrics,
        rows=[_row(rank, entry, table, metrics) for rank, entry in enumerate(table.entries, start=1)],
        groups=groups,
        sources=published().sources,
        evidence=EVIDENCE,
        tie=TIE,
    )


def warnings(receipt: Receipt) -> list[str]:
    """Return signs that a receipt's captions exploit their reward."""
    ours, human = receipt.diagnostics["captions"], receipt.diagnostics["references"]
    found = []
    for key, (threshold, text) in _FLAGGED_ABOVE.items():
        share, usual = float(ours[key]), float(human[key])  # type: ignore[literal-required]
        if share > threshold:
            found.append(f"{share:.1%} of captions {text} (references: {usual:.1%})")
    objective = receipt.provenance.get("objective", "cross-entropy")
    if objective != "cross-entropy" and not receipt.provenance.get("end_token_rewarded"):
        found.append("the end of a caption was not rewarded")
    return found


def to_json(table: Table) -> dict[str, Any]:
    """Return a table and its receipts, the best first, as JSON types; scores are not multiplied by 100."""
    rows = []
    for rank, (name, receipt) in enumerate(table.entries, start=1):
        row = {"rank": rank if table.ranked_by in receipt.scores else None, "name": name}
        values = {key: getattr(receipt, key) for key in ("scores", "intervals", "provenance", "notes")}
        rows.append({**row, **values, "warnings": warnings(receipt)})
    head = {key: getattr(table, key) for key in ("title", "references_sha256", "signature", "ranked_by")}
    return {**head, "rows": rows}


def _row(rank: int, entry: Entry, table: Table, metrics: Sequence[str]) -> dict[str, Any]:
    """Return what the template shows of a receipt."""
    receipt = entry.receipt
    # A metric that was not computed needs no note here.
    notes = [note for note in receipt.notes if "not computed" not in note]
    return {
        "rank": rank if table.ranked_by in receipt.scores else "",
        "name": entry.name,
        "facts": [" · ".join(_facts(receipt.provenance)), *notes],
        "warnings": warnings(receipt),
        "cells": [_cell(metric, receipt, table) for metric in metrics],
    }


def _cell(metric: str, receipt: Receipt, table: Table) -> dict[str, Any] | None:
    if metric not in receipt.scores:
        return None
    others = [entry.receipt for entry in table.entries if metric in entry.receipt.scores]
    best = max(others, key=lambda each: each.scores[metric])
    ranked, leads = len(table.entries) > 1, receipt.scores[metric] == best.scores[metric]
    return {
        "value": repr(receipt.scores[metric]),
        "score": f"{100 * receipt.scores[metric]:.1f}",
        "interval": interval_text(receipt.intervals[metric]),
        "best": ranked and leads,
        "tie": ranked and not leads and receipt.intervals[metric][1] >= best.intervals[metric][0],
    }


def _facts(provenance: dict[str, Any]) -> Iterator[str]:
    """Yield how the captions were generated, as far as the receipt says."""
    search = provenance.get("search")
    facts = provenance | (search if isinstance(search, dict) else {})
    for key in ("split", "objective", "seed", "step", "beam", "captions"):
        if key in facts:
            value = facts[key]
            yield f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"


def _read(places: Sequence[Path], out: Path) -> list[Entry]:
    """Return the valid receipts, named by the parts of their paths that differ."""
    files: dict[Path, None] = {}
    faults: list[UserError] = []
    for place in places:
        found = sorted(place.rglob("receipt.json")) if place.is_dir() else [place]
        if not found:
            error = f"{place}: no receipt.json in this folder, expected what captionscale score writes;"
            faults.append(UserError(f"{error} score a run first, or give another folder"))
        files |= dict.fromkeys(Path(realpath(file)) for file in found)
    if out.exists() and out.resolve() in files:
        raise UserError(f"{out}: is a receipt, expected a path for the page; take another --out")
    valid: dict[Path, Receipt] = {}
    for file in files:
        try:
            valid[file] = Receipt.read(file)
        except UserError as error:
            faults.append(error)
    for fault in faults if valid else faults[:-1]:
        say(f"left out: {fault}")
    if not valid:
        raise faults[-1]
    root = Path(commonpath([file.parent for file in valid]))
    return [Entry(_name(file, root), receipt) for file, receipt in valid.items()]


def _name(file: Path, root: Path) -> str:
    path = file.parent if file.name == "receipt.json" else file.with_suffix("")
    return "/".join(part for part in path.relative_to(root).parts if part != "scores") or path.name
