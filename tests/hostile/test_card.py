"""The model card shows names, splits, signatures and notes of a run as text, whatever they hold."""

import re
from html.parser import HTMLParser
from pathlib import Path

from experiment import peaked_run
from markdown_it import MarkdownIt

from captionscale.cli import main
from captionscale.escape import for_terminal
from captionscale.score import score
from captionscale.train.checkpoint import open_checkpoint

EVIL = (
    '`"><img src=x onerror=alert(1)><script>alert(2)<b>\x1b]0;PWN\x07\u202e\n# h\n| a | [l](http://evil) *x*'
)


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, _) -> None:
        self.tags.add(tag)

    def handle_data(self, data) -> None:
        self.text += data


def test_a_card_is_the_same_page_whatever_a_run_is_called(packed: Path, tmp_path: Path) -> None:
    name = EVIL.replace("/", "")
    run = peaked_run(tmp_path, packed).rename(tmp_path / name)
    made = score(
        {1: "a dog", 2: "a cat"},
        {1: ["a dog runs"], 2: ["a cat sits"]},
        ["BLEU-1"],
        provenance={"split": EVIL},
        hashes={"model": open_checkpoint(run).sha256},
    )
    made.notes.append(EVIL)
    made.write(run / "receipt.json")
    out = tmp_path / "card"
    main(["export", str(run), "--format", "hub", "--out", str(out)])
    text = (out / "README.md").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", text)
    page = Page(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text.split("---\n", 2)[2]))
    assert page.tags <= {
        "h1",
        "h2",
        "p",
        "code",
        "pre",
        "ul",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert page.text.lstrip().startswith(" ".join(for_terminal(name).split()))
    assert page.text.count("<script>alert(2)") >= 3
    assert f"Split {for_terminal(EVIL)}: 2 images, 2 references." in page.text
