"""One static page of receipts side by side, with what others published beside them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonpath, realpath
from pathlib import Path
from string import Template
from typing import Any

from captionscale.errors import UserError
from captionscale.escape import for_html
from captionscale.files import atomic_write, check_writable
from captionscale.progress import say
from captionscale.score.metrics import METRICS
from captionscale.score.receipt import Receipt
from captionscale.tools.published import EVIDENCE, Row, published
from captionscale.version import __version__

_RANKED_BY = "CIDEr-D"
_PLAIN = "cross-entropy"
TIE = "≈\u202f"
_BEST = ' class="best"'
_NAMES = ' class="name" data-sort="text"'
_NUMBERS = ' data-sort="number"'
_FLAGGED_ABOVE = {
    "empty": (0.01, "are empty"),
    "dangling_endings": (0.10, "end in 'a', 'with' or the like"),
    "repeated_words": (0.05, "say a word twice in a row"),
    "repeated_3_grams": (0.05, "say three words twice"),
}
"""Above which share of the captions the diagnostics' figure is flagged, and how that is said."""


@dataclass(frozen=True)
class Entry:
    """A receipt, and the name that the board has for it."""

    name: str
    receipt: Receipt


@dataclass
class Table:
    """Receipts that may be ranked together: of the same references, measured with the same things."""

    references_sha256: str
    metric_signature: dict[str, str]
    entries: list[Entry] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """Those of any receipt, in the order of columns."""
        found = {metric for entry in self.entries for metric in entry.receipt.scores}
        return [*(metric for metric in METRICS if metric in found), *sorted(found.difference(METRICS))]

    @property
    def ranked_by(self) -> str:
        """The metric by which the page is sorted before anybody sorts it."""
        return _RANKED_BY if _RANKED_BY in self.metrics else self.metrics[-1]


def write_board(places: Sequence[Path], out: Path) -> list[Table]:
    """Write the page; it needs no other file, no network, and JavaScript only to sort by another column.

    Args:
        places: Receipts, and folders in which each `receipt.json` is one.
        out: Where the page goes.

    Returns:
        What it shows: tables of receipts that may be ranked together. What is no whole receipt is told on
        the standard error, and left out.

    Raises:
        UserError: No whole receipt at all, or a place that cannot be written.
    """
    check_writable(out)
    tables = group_into_tables(_read(places, out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        # A file's name may hold bytes that are no text.
        file.write(page(tables).encode(errors="replace"))
    return tables


def group_into_tables(entries: Iterable[Entry]) -> list[Table]:
    """Part receipts by what they may be ranked with, and rank them.

    Two receipts share a table if their references are the same, and nothing that their signatures both say
    of how they were measured differs.
    """
    tables: list[Table] = []
    # By name: where one could join two tables, the first takes it, whatever the order of arguments.
    for entry in sorted(entries, key=lambda entry: entry.name):
        references, metric_signature = entry.receipt.hashes["references"], entry.receipt.metric_signature
        for table in tables:
            shared = table.metric_signature.keys() & metric_signature.keys()
            if table.references_sha256 == references and all(
                table.metric_signature[part] == metric_signature[part] for part in shared
            ):
                break
        else:
            table = Table(references, {})
            tables.append(table)
        table.metric_signature |= metric_signature
        table.entries.append(entry)
    for table in tables:
        by = table.ranked_by
        table.entries.sort(key=lambda entry: -entry.receipt.scores.get(by, float("-inf")))
    return sorted(
        tables,
        key=lambda table: (-len(table.entries), _title(table), sorted(table.metric_signature.values())),
    )


def page(tables: Sequence[Table]) -> str:
    """Return the page as HTML."""
    receipts = sum(len(table.entries) for table in tables)
    summary = f"{_count(receipts, 'receipt')} in {_count(len(tables), 'table')}."
    if len(tables) > 1:
        summary += (
            " Scores on other references, or measured in another way, have a table of their own: they cannot"
            " be ranked together."
        )
    template = Template(Path(__file__).with_name("board.html").read_text(encoding="utf-8"))
    sections = "\n".join(map(section, tables))
    return template.substitute(
        version=for_html(__version__), style=style(), summary=summary, tie=TIE, sections=sections
    )


def style() -> str:
    """Return what a page of ours looks like, as CSS."""
    return (Path(__file__).parents[1] / "templates" / "page.css").read_text(encoding="utf-8")


def section(table: Table) -> str:
    """Return a table and what is to be known of it, as HTML."""
    split = published().find_split(table.references_sha256)
    groups = published().groups(split) if split else {}
    published_metrics = {metric for rows in groups.values() for row in rows for metric in row.scores}
    metrics = table.metrics + sorted(published_metrics.difference(table.metrics))
    title, counts = for_html(_title(table)), table.entries[0].receipt.counts
    heads = "".join(_head(metric, _NUMBERS, metric == table.ranked_by) for metric in metrics)
    legend = "; ".join(f"[{mark}] {meaning}" for mark, meaning in EVIDENCE.items())
    references, metric_signature = (
        for_html(table.references_sha256[:12]),
        for_html(" | ".join(table.metric_signature.values())),
    )
    facts = f"{counts['images']:,} images, {counts['references']:,} references (<code>{references}</code>)"
    lines = [
        f"<section>\n<h2>{title}</h2>",
        f'<p class="facts">{facts}, measured with <code>{metric_signature}</code></p>',
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>',
        f'<thead><tr><th scope="col" class="rank">#</th>{_head("model", _NAMES)}{heads}</tr></thead>',
        _ours(table, metrics),
        *(_theirs(group, rows, metrics) for group, rows in groups.items()),
        "</table></div>",
        f'<p class="legend">Published: {legend}. Their authors measured them: no rank here.</p>'
        * bool(groups),
        "</section>",
    ]
    return "\n".join(lines)


def warnings(receipt: Receipt) -> list[str]:
    """Return reasons not to believe a receipt's scores: captions that only a reward likes."""
    ours, people = receipt.diagnostics["captions"], receipt.diagnostics["references"]
    alarms = []
    for key, (threshold, said) in _FLAGGED_ABOVE.items():
        share, usual = float(ours[key]), float(people[key])  # type: ignore[literal-required]
        if share > threshold:
            alarms.append(f"{share:.1%} of captions {said} (people's: {usual:.1%})")
    if receipt.provenance.get("objective", _PLAIN) != _PLAIN and not receipt.provenance.get(
        "end_token_rewarded"
    ):
        alarms.append("the end of a caption was not rewarded")
    return alarms


def _read(places: Sequence[Path], out: Path) -> list[Entry]:
    """Return the whole receipts at places, named by the parts of their paths that differ."""
    found: dict[Path, None] = {}
    faults: list[UserError] = []
    for place in places:
        files = sorted(place.rglob("receipt.json")) if place.is_dir() else [place]
        if not files:
            faults.append(
                UserError(
                    f"{place}: no receipt.json in this folder; wanted what captionscale score writes;"
                    " score a run first, or give another folder"
                )
            )
        found |= dict.fromkeys(Path(realpath(file)) for file in files)
    if out.exists() and out.resolve() in found:
        raise UserError(f"{out}: is a receipt, wanted a place for the page; take another --out")
    whole: dict[Path, Receipt] = {}
    for file in found:
        try:
            whole[file] = Receipt.read(file)
        except UserError as error:
            faults.append(error)
    for fault in faults if whole else faults[:-1]:
        say(f"left out: {fault}")
    if not whole:
        raise faults[-1]
    root = Path(commonpath([file.parent for file in whole]))
    return [Entry(_name(file, root), receipt) for file, receipt in whole.items()]


def _name(file: Path, root: Path) -> str:
    path = file.parent if file.name == "receipt.json" else file.with_suffix("")
    return "/".join(part for part in path.relative_to(root).parts if part != "scores") or path.name


def _title(table: Table) -> str:
    """Return the name of what was scored: the published one, or else the receipts' own."""
    split = published().find_split(table.references_sha256)
    if split:
        return published().splits[split].title
    splits = [entry.receipt.provenance.get("split") for entry in table.entries]
    names = {str(split) for split in splits if split is not None}
    return f"Split {' / '.join(sorted(names))}" if names else "Other references"


def _head(name: str, attributes: str, sorted_by: bool = False) -> str:
    order = ' aria-sort="descending"' if sorted_by else ""
    return f'<th scope="col"{attributes}{order}>{for_html(name)}</th>'


def _ours(table: Table, metrics: Sequence[str]) -> str:
    receipts = [entry.receipt for entry in table.entries]
    best = {
        metric: max(
            (each for each in receipts if metric in each.scores), key=lambda each: each.scores[metric]
        )
        for metric in table.metrics
    }
    lines = ['<tbody class="ours">']
    for place, entry in enumerate(table.entries, start=1):
        # What was not asked for is no note on what is here.
        notes = [note for note in entry.receipt.notes if "not computed" not in note]
        known = (" · ".join(_made(entry.receipt.provenance)), *notes)
        lesser = "".join(f"<small>{for_html(text)}</small>" for text in known)
        flags = "".join(f'<span class="flag">{for_html(text)}</span>' for text in warnings(entry.receipt))
        lines.append(
            f'<tr><td class="rank">{place if table.ranked_by in entry.receipt.scores else ""}</td>'
            + _name_cell(entry.name, lesser + flags)
            + "".join(_cell(metric, entry.receipt, best.get(metric), len(receipts)) for metric in metrics)
            + "</tr>"
        )
    return "\n".join([*lines, "</tbody>"])


def _made(provenance: dict[str, Any]) -> Iterator[str]:
    """Yield what made the captions, as far as its receipt says it."""
    search = provenance.get("search")
    facts = provenance | (search if isinstance(search, dict) else {})
    for key in ("split", "objective", "seed", "step", "beam", "captions"):
        if key in facts:
            value = facts[key]
            yield f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"


def _cell(metric: str, receipt: Receipt, best: Receipt | None, receipts: int) -> str:
    if metric not in receipt.scores or best is None:
        return "<td></td>"
    score, (low, high) = receipt.scores[metric], receipt.intervals[metric]
    leads = receipts > 1 and score == best.scores[metric]
    ties = receipts > 1 and not leads and high >= best.intervals[metric][0]
    return (
        f'<td{_BEST * leads} data-value="{score!r}">{TIE * ties}{100 * score:.1f}'
        f"<small>{100 * low:.1f} to {100 * high:.1f}</small></td>"
    )


def _theirs(group: str, rows: Sequence[Row], metrics: Sequence[str]) -> str:
    title = f"<span>Published, their own evaluation. {for_html(group)}</span>"
    head = f'<th scope="rowgroup" colspan="{2 + len(metrics)}">{title}</th>'
    lines = ['<tbody class="published">', f'<tr class="group">{head}</tr>']
    for row in rows:
        source = published().sources[row.source]
        words = for_html(source.citation)
        linked = f'<a href="{for_html(source.url)}">{words}</a>' if source.url else words
        made = " · ".join(filter(None, (row.encoder, row.loss, f"beam {row.beam}" if row.beam else "")))
        note = f'<span class="flag">{for_html(row.note)}</span>' if row.note else ""
        more = f"<small>{for_html(made)}</small><small>{linked} [{for_html(row.evidence)}]</small>{note}"
        cells = "".join(_published_cell(metric, row) for metric in metrics)
        lines.append(f'<tr><td class="rank"></td>{_name_cell(row.model, more)}{cells}</tr>')
    return "\n".join([*lines, "</tbody>"])


def _published_cell(metric: str, row: Row) -> str:
    if metric not in row.scores:
        return "<td></td>"
    if metric in row.incomparable:
        # Without a value to sort by: it comes last, whichever way the column is sorted.
        return f'<td class="incomparable">({row.scores[metric]})</td>'
    return f'<td data-value="{row.scores[metric]}">{row.scores[metric]}</td>'


def _name_cell(name: str, more: str) -> str:
    return f'<th scope="row" class="name" data-value="{for_html(name)}"><b>{for_html(name)}</b>{more}</th>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
