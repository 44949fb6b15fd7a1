import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
import pytest

from captionscale.cli import main
from captionscale.data.sources import coco
from captionscale.errors import UserError
from captionscale.score.diagnostics import diagnose
from captionscale.score.metrics import METRICS
from captionscale.score.receipt import ImageResults, Receipt, references_sha256
from captionscale.tools.board import group_into_tables, write_board
from captionscale.tools.published import EVIDENCE, published

KARPATHY = published().splits["karpathy-test"].references_sha256
OTHER = "ab" * 32
SIGNATURE = "ptb corenlp-3.4.1|bleu coco|cider-d n4|beam 5"


def receipt(
    cider: float,
    *,
    references: str = OTHER,
    signature: str = SIGNATURE,
    width: float = 0.02,
    metrics: Sequence[str] = ("BLEU-4", "CIDEr-D"),
    caption: str = "a dog runs",
    **provenance: object,
) -> Receipt:
    """A receipt with the given CIDEr-D, and a third of it for every other metric."""
    scores = {metric: cider if metric == "CIDEr-D" else cider / 3 for metric in metrics}
    known = [(name, METRICS.get(name)) for name in metrics]
    sums = {each.family if each else name: np.ones((1, each.width if each else 2)) for name, each in known}
    return Receipt(
        scores=scores,
        intervals={metric: (score - width, score + width) for metric, score in scores.items()},
        bootstrap={"resamples": 1000, "seed": 0},
        diagnostics=diagnose({1: caption}, {1: ["a dog is running"]}),
        counts={"images": 1, "captions": 1, "empty_captions": 0, "words": 3, "references": 1},
        hashes={"references": references, "captions": "cd" * 32},
        signature=signature,
        provenance=dict(provenance),
        notes=[],
        environment={"time": "2026-01-01T00:00:00+00:00"},
        images=ImageResults(
            [1], [caption], {metric: np.array([score]) for metric, score in scores.items()}, sums
        ),
    )


class Page(HTMLParser):
    """The tables of a page: of each its bodies, of each the rows, of each the cells' classes and texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[tuple[str, list[list[tuple[str, str]]]]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.row: list[tuple[str, str]] | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.tags.append((tag, named))
        if tag == "table":
            self.tables.append([])
        elif tag == "tbody":
            self.tables[-1].append((named["class"] or "", []))
        elif tag == "tr" and self.tables[-1]:
            self.row = []
            self.tables[-1][-1][1].append(self.row)
        elif tag in ("td", "th") and self.row is not None:
            self.row.append((named.get("class") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self.row = None

    def handle_data(self, data: str) -> None:
        if self.row:
            kind, text = self.row[-1]
            self.row[-1] = kind, text + data


def board(folder: Path, receipts: dict[str, Receipt]) -> Page:
    for name, each in receipts.items():
        each.write(folder / "in" / name / "receipt.json")
    write_board([folder / "in"], folder / "board.html")
    return Page(folder / "board.html")


def test_every_published_row_has_a_source_a_class_and_figures_that_were_checked() -> None:
    data = published()
    assert len(data.rows) > 50
    for row in data.rows:
        assert row.split in data.splits
        assert row.group in data.classes
        assert row.evidence in EVIDENCE
        assert data.sources[row.source].citation
        assert data.sources[row.source].url.startswith("https://") or not data.sources[row.source].url
        assert row.scores.keys() <= {*METRICS, "SPICE"}
        assert all(10 < score < 160 for score in row.scores.values())
        assert row.note or not row.incomparable
    assert {row.source for row in data.rows} == data.sources.keys()
    # On word ids and by nltk.
    assert all(row.incomparable == ("BLEU-4",) for row in data.rows if row.source == "sgrvinod")


@pytest.mark.parametrize("part", ["test", "val"])
def test_karpathys_splits_are_recognized_by_their_references(part, real_data) -> None:
    references = coco.read_references(real_data / "coco_karpathy" / f"captions_{part}5k.json")
    assert published().find_split(references_sha256(references)) == f"karpathy-{part}"


def test_only_comparable_receipts_are_ranked_together(tmp_path) -> None:
    signatures = [SIGNATURE, SIGNATURE + "|spice 1.0", SIGNATURE + "|spice 1.1", "ptb other|bleu coco"]
    receipts = {
        f"{number}-{references[:2]}": receipt(1 + number / 10, references=references, signature=signature)
        for references in (OTHER, KARPATHY)
        for number, signature in enumerate(signatures)
    }
    for name, each in receipts.items():
        each.write(tmp_path / name / "receipt.json")
    tables = write_board([tmp_path], tmp_path / "board.html")
    assert sorted(len(table.entries) for table in tables) == [1, 1, 1, 1, 2, 2]
    for table in tables:
        for one, other in combinations((entry.receipt for entry in table.entries), 2):
            assert one.hashes["references"] == other.hashes["references"]
            shared_parts = one.metric_signature.keys() & other.metric_signature.keys()
            assert all(one.metric_signature[part] == other.metric_signature[part] for part in shared_parts)
    # Nor does the order in which receipts are named change the page.
    first = (tmp_path / "board.html").read_bytes()
    write_board([tmp_path / name for name in reversed(receipts)], tmp_path / "board.html")
    assert (tmp_path / "board.html").read_bytes() == first
    assert group_into_tables([]) == []


def test_published_rows_are_next_to_receipts_of_their_split_and_have_no_rank(tmp_path) -> None:
    page = board(tmp_path, {"a": receipt(0.9, references=KARPATHY), "b": receipt(1.1)})
    of_karpathy, of_other = sorted(page.tables, key=len, reverse=True)
    assert [kind for kind, _ in of_other] == ["ours"]
    assert [kind for kind, _ in of_karpathy] == ["ours", "published", "published", "published"]
    theirs = [row for kind, rows in of_karpathy if kind == "published" for row in rows[1:]]
    assert len(theirs) == sum(row.split == "karpathy-test" for row in published().rows)
    assert all(row[0] == ("rank", "") for row in theirs)
    assert all("Published, their own evaluation" in rows[0][0][1] for kind, rows in of_karpathy[1:])
    # What is not comparable is marked, and has no value to sort by.
    marked = [text for row in theirs for kind, text in row if kind == "incomparable"]
    assert marked == ["(30.28)", "(33.06)", "(33.29)"]
    assert not [
        tag for tag, named in page.tags if named.get("class") == "incomparable" and "data-value" in named
    ]


def test_ours_are_ranked_and_ties_with_the_best_are_marked(tmp_path) -> None:
    page = board(tmp_path, {"weak": receipt(0.8), "near": receipt(0.98), "best": receipt(1.0)})
    [[(_, rows)]] = page.tables
    assert [(row[0][1], row[1][1]) for row in rows] == [("1", "best"), ("2", "near"), ("3", "weak")]
    assert [(row[3][0], row[3][1][:1]) for row in rows] == [("best", "1"), ("", "≈"), ("", "8")]
    assert rows[0][3][1] == "100.098.0 to 102.0"
    # Alone, a receipt is best of nothing.
    alone = board(tmp_path / "alone", {"x": receipt(1.0)})
    assert alone.tables[0][0][1][0][3] == ("", "100.098.0 to 102.0")


def test_captions_that_exploit_their_reward_are_flagged(tmp_path) -> None:
    hacked = receipt(1.2, caption="a dog with a dog with a", objective="scst", end_token_rewarded=False)
    plain = receipt(0.9, objective="cross-entropy", end_token_rewarded=False, seed=3, step=12_000)
    [[(_, [first, second])]] = board(tmp_path, {"hacked": hacked, "plain": plain}).tables
    assert "100.0% of captions end in 'a', 'with' or the like (references: 0.0%)" in first[1][1]
    assert "have the same three words twice" in first[1][1]
    assert "the end of a caption was not rewarded" in first[1][1]
    assert second[1][1] == "plainobjective cross-entropy · seed 3 · step 12,000"


def test_the_page_shows_any_text_as_text_and_needs_nothing_from_elsewhere(tmp_path) -> None:
    markup = '<script>alert(1)</script>"><img src=x onerror=y> $version & é\udc80'
    each = receipt(0.9, signature=f"ptb {markup}", metrics=["BLEU-4", markup], split=markup, captions=markup)
    name = markup.replace("/", "")
    page = board(tmp_path, {name: each, "plain": receipt(0.9, references=KARPATHY)})
    names = [row[1][1] for table in page.tables for _, rows in table[:1] for row in rows]
    assert names[-1].startswith(name.replace("\udc80", r"\udc80"))
    assert not [tag for tag, _ in page.tags if tag in ("img", "link", "iframe", "base")]
    assert [named for tag, named in page.tags if tag == "script"] == [{}]
    assert {
        name for _, named in page.tags for name in named if name.startswith("on") or name == "src"
    } == set()
    assert {tag for tag, named in page.tags if "href" in named} == {"a"}
    text = (tmp_path / "board.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", text)


def test_the_command_reports_what_the_page_shows_and_refuses_what_it_cannot_show(tmp_path, capsys) -> None:
    receipt(0.9).write(tmp_path / "runs" / "a" / "receipt.json")
    receipt(0.9, references=KARPATHY).write(tmp_path / "b.json")
    out = tmp_path / "new" / "board.html"
    main(["board", str(tmp_path / "runs"), str(tmp_path / "b.json"), "--out", str(out)])
    output = capsys.readouterr().out
    assert output.startswith(f"{out}: 2 receipts in 2 tables: other references")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no receipt\.json in this folder"):
        write_board([tmp_path / "empty"], out)
    with pytest.raises(UserError, match="nothere"):
        write_board([tmp_path / "nothere"], out)
    with pytest.raises(UserError, match="is a folder, expected a file"):
        write_board([tmp_path / "runs"], tmp_path / "runs")


def test_json_has_the_rows_of_each_table_with_scores_as_in_the_receipts(tmp_path, capsys) -> None:
    for name, score in (("weak", 0.8), ("best", 1.0)):
        receipt(score, split="val").write(tmp_path / name / "receipt.json")
    receipt(0.9, metrics=["BLEU-4"]).write(tmp_path / "other" / "receipt.json")
    out = tmp_path / "board.html"
    main(["board", str(tmp_path), "--out", str(out), "--json"])
    tree = json.loads(capsys.readouterr().out)
    assert tree["page"] == str(out)
    [table] = tree["tables"]
    assert (table["title"], table["ranked_by"]) == ("Split val", "CIDEr-D")
    assert table["signature"].startswith("ptb corenlp-3.4.1 | bleu coco")
    assert [(row["rank"], row["name"]) for row in table["rows"]] == [
        (1, "best"),
        (2, "weak"),
        (None, "other"),
    ]
    assert table["rows"][0]["scores"] == {"BLEU-4": 1.0 / 3, "CIDEr-D": 1.0}
    assert table["rows"][0]["intervals"]["CIDEr-D"] == [0.98, 1.02]
    assert table["rows"][0]["provenance"] == {"split": "val"}
    assert Page(out).tables


def test_a_broken_receipt_is_named_and_left_out(tmp_path, capsys) -> None:
    places = {name: tmp_path / "in" / name / "receipt.json" for name in ("good", "cut", "odd")}
    for path in places.values():
        receipt(0.9, split=["a", "list"], search=5).write(path)
    places["cut"].write_bytes(places["cut"].read_bytes()[:-9])
    msgspec.structs.replace(receipt(0.9), intervals={}).write(places["odd"])
    (tmp_path / "empty").mkdir()
    out = tmp_path / "board.html"
    main(["board", str(tmp_path / "in"), str(tmp_path / "empty"), str(tmp_path / "none"), "--out", str(out)])
    output = capsys.readouterr()
    assert output.out == f"{out}: 1 receipt\n"
    warnings = [line for line in output.err.splitlines() if line.startswith("left out: ")]
    for line, place in zip(warnings, ["empty", "in/cut", "in/odd", "none"], strict=True):
        assert f"{tmp_path / place}" in line
        assert line.endswith(("; score the captions again", "or give another folder", "; correct the path"))
    assert Page(out).tables[0][0][1][0][1][1].startswith("goodsplit ['a', 'list']")
    # None is left: the page of before stays.  Nor is a broken receipt written over.
    with pytest.raises(SystemExit, match="1"):
        main(["board", str(places["cut"]), str(places["odd"]), "--out", str(out)])
    assert capsys.readouterr().err.count("no receipt, or a damaged one") == 2
    assert Page(out).tables
    with pytest.raises(UserError, match="is a receipt, expected a path for the page"):
        write_board([tmp_path / "in"], places["cut"])


def test_receipts_of_before_their_signature_named_pycocoevalcap_are_ranked_with_later_ones(tmp_path) -> None:
    parts = [SIGNATURE, f"pycocoevalcap 1.2|{SIGNATURE}", f"pycocoevalcap 1.3|{SIGNATURE}"]
    for number, signature in enumerate(parts):
        receipt(0.9, signature=signature).write(tmp_path / str(number) / "receipt.json")
    assert [len(table.entries) for table in write_board([tmp_path], tmp_path / "board.html")] == [2, 1]
