"""Text that others chose reaches terminals, pages, cards, shells and file names without effect."""

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

from captionscale import cli, progress
from captionscale.errors import UserError
from captionscale.escape import (
    for_file_name,
    for_html,
    for_markdown,
    for_markdown_code,
    for_shell,
    for_terminal,
    for_terminal_lines,
)
from captionscale.html import render
from captionscale.progress import SafeConsole, say, spinner
from captionscale.terminal import SafeStream, safe_streams
from captionscale.tools.curves import _Curve, _draw, _Series

CONTROLS = [
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ud800\udcff\udfff",
]
ORDINARY = "é 狗 כלב كلب 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ZWNJ\u200c LRM\u200e NBSP\u00a0 \\ \\n [b] {x} % $HOME `ls`"
EVIL = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
EVIL += "\x1b]0;PWN\x07\x1b[31m\x9b2J\r\u202e[/b]\n# h | `x`"
EFFECTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
OWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def strings(number: int) -> Iterator[str]:
    """Yield short texts of letters that have a meaning somewhere."""
    chosen = random.Random(15)
    letters = [
        *CONTROLS,
        *"\\\\''\"\"``$!*?[]{}()<>|&;#~=%-+_.:/@ \t\n\nab",
        "é",
        "狗",
        "http://a.b",
        "www.a.b",
        "1. ",
    ]
    for _ in range(number):
        yield "".join(chosen.choices(letters, k=chosen.randrange(1, 12)))


class Tags(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[object] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append((tag, attributes))

    def handle_data(self, data) -> None:
        self.text += data


@pytest.mark.parametrize("control", CONTROLS, ids=lambda it: f"{ord(it):04x}")
def test_no_control_character_stays(control) -> None:
    said = for_terminal(f"a{control}b")
    assert said.isascii()
    assert said.isprintable()
    assert said != "ab"
    kept = for_terminal_lines(f"a{control}b")
    assert kept == (f"a{control}b" if control in "\n\t" else said)


def test_ordinary_text_of_any_language_stays_as_it_is() -> None:
    assert for_terminal(ORDINARY) == ORDINARY
    assert for_terminal_lines(f"{ORDINARY}\n\t{ORDINARY}\n") == f"{ORDINARY}\n\t{ORDINARY}\n"


def test_what_is_escaped_within_json_is_json_still() -> None:
    tree = {"a\x7f\x85": "\u2028\u202e" + ORDINARY}
    assert json.loads(for_terminal_lines(json.dumps(tree, ensure_ascii=False))) == tree


def test_html_shows_text_and_has_no_other_tag() -> None:
    for text in (EVIL, *strings(500)):
        page = Tags(f'<p title="{for_html(text)}">{for_html(text)}</p>')
        shown = for_terminal_lines(text)
        assert page.tags == [("p", [("title", shown)])]
        assert page.text == shown
        page.text.encode()


def test_markdown_shows_text_and_has_no_other_element() -> None:
    # With what GitHub and the hub have besides.
    renderer = MarkdownIt("gfm-like", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
    for text in (
        EVIL,
        "- x",
        "1) x",
        "+ x",
        "===",
        "---",
        "[a](b)",
        "![a](b)",
        "<b>",
        "&amp;",
        *strings(500),
    ):
        if not text.strip():
            continue
        for form, shell in (
            ("{}", ["p"]),
            ("# a {}", ["h1"]),
            ("* {}", ["ul", "li"]),
            ("a {} b", ["p"]),
            ("|a|b|\n|-|-|\n|c| {} |", ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]),
        ):
            page = Tags(renderer.render(form.format(for_markdown(text))))
            assert [tag for tag, _ in page.tags] == shell, (text, form)
            assert " ".join(for_terminal(text).split()) in " ".join(page.text.split()), (text, form)


def test_github_makes_no_link_of_an_address() -> None:
    for text in (
        "http://evil.example/",
        "www.evil.example",
        "WWW.evil.example",
        "me@evil.example",
        "#15",
        "@me",
    ):
        assert not re.search(r"(?i)https?://|(?<!\\)@|www\.|(?<!\\)#", for_markdown(text))


def test_a_code_span_of_markdown_holds_any_text() -> None:
    renderer = MarkdownIt()
    for text in ("`", "``", "a`b``c", "|", " a ", "<b>", EVIL, *strings(500)):
        page = Tags(renderer.render(f"a {for_markdown_code(text)} b"))
        assert [tag for tag, _ in page.tags] == ["p", "code"], text
        # Some renderers take spaces off the ends.
        assert page.text.split() == f"a {for_terminal(text)} b".split()


def test_bash_splits_a_command_into_the_same_words() -> None:
    words = [text.replace("\0", "") for text in strings(500)]
    # Lone surrogates other than those of file names are in no argument of any program.
    words = [
        re.sub("[\ud800-\udc7f\udd00-\udfff]", "", text) for text in [*words, "", "-n", "--", "*", "~", "a=b"]
    ]
    command = for_shell("printf", r"%s\0", *words)
    assert not EFFECTS.search(command)
    assert "\n" not in command
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [word.encode(errors="surrogateescape") for word in words]


def test_a_file_name_is_one_part_of_a_path_and_differs_for_different_texts(tmp_path: Path) -> None:
    odd = [
        "",
        ".",
        "..",
        "../a",
        "/etc/passwd",
        "-rf",
        "a" * 300,
        "é" * 300,
        "con",
        "NUL.txt",
        "a.",
        "a\x1bb",
        " a",
    ]
    names = {}
    for text in {*odd, *strings(500)}:
        name = for_file_name(text, ".png")
        assert names.setdefault(name, text) == text
        assert not EFFECTS.search(name)
        assert not set(name) & set('/\\\n<>:"|?*')
        assert name[0] not in "-. ~"
        assert len(name.encode()) <= 255
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(names)
    for text in ("dog 1", "狗", "COCO_val2014_000000000042", "a.b_c-d"):
        assert for_file_name(text, ".png") == f"{text}.png"


def test_streams_pass_no_control_character_on(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_streams():
        print(EVIL, ORDINARY, "\ud800")
        print(EVIL, file=sys.stderr)
        sys.stderr.writelines(["a\x1b", "b\n"])
        json.dump(EVIL, sys.stdout)
    heard = capsys.readouterr()
    assert not EFFECTS.search(heard.out + heard.err)
    assert ORDINARY in heard.out
    assert heard.err.endswith("a\\u001bb\n")


def test_a_terminal_gets_rich_s_own_control_sequences_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Tty()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, SafeStream(screen))
    monkeypatch.setattr(progress, "console", lambda: SafeConsole(file=screen, force_terminal=True, width=400))
    with progress.progress(EVIL, 2) as bar:
        bar.note(EVIL)
        bar.say(EVIL)
        print(EVIL)
        with spinner(EVIL):
            print(EVIL, file=sys.stderr)
        bar.advance(2)
    say(EVIL, EVIL)
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL, "red"))
    SafeConsole(force_terminal=True, width=400).print(table, EVIL)
    shown = screen.getvalue()
    assert shown.count(r"\u001b]0;PWN") >= 10
    # What rich sends is of these kinds: no title, and no colour that was in the text.
    assert not EFFECTS.search(OWN.sub("", shown).replace("\r", "").replace("\b", ""))
    assert "\x1b[31m\\" not in shown
    assert "alert(2)</script>\\u001b]0;PWN\\u0007\\u001b[31m\\u009b2J\\r\\u202e[/b]\\n" in shown


def test_an_error_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        cli.main(["verify", f"/nowhere/{EVIL}"])
    heard = capsys.readouterr().err
    assert heard.count("\n") == 1
    assert not EFFECTS.search(heard)
    assert r"\u001b[31m" in heard


def test_what_the_parser_refuses_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["\x1b[31m"], ["verify", "a", "\x1b[31m"], ["verify", "a", "--workers", "\x1b[31m"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert not EFFECTS.search(capsys.readouterr().err)


def test_several_problems_are_as_many_lines() -> None:
    error = UserError("a", "b")
    assert str(error) == "a\nb"


@pytest.mark.parametrize("ascii_alone", [False, True])
def test_a_pipe_gets_captions_byte_by_byte(ascii_alone) -> None:
    # As a process, where the streams are real, in a locale that has ASCII alone too.
    text = f"from captionscale.terminal import make_safe; make_safe(); print({ORDINARY!r})"
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "utf-8", **({"LC_ALL": "C"} if ascii_alone else {})},
    )
    assert done.stdout == f"{ORDINARY}\n".encode()


def test_a_curve_names_its_points_without_control_characters() -> None:
    short = EVIL[-30:]
    series = [_Series(f"{short}{number}", {1: 0.5, 2: 0.6}) for number in range(2)]
    curve = _Curve(EVIL, EVIL, _draw(EVIL, short, series))
    page = render("report_curves.html", verdict=EVIL, curves=[curve], has_intervals=True)
    assert not EFFECTS.search(page)
    assert "<script" not in page
    assert "<img" not in page
