import io
import re
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from captionscale import progress as progress_module
from captionscale.progress import Bar, console, progress, spinner


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a terminal of 120 columns gets."""
    written = io.StringIO()
    fake = Console(file=written, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(progress_module, "console", lambda: fake)
    return written


def test_without_a_terminal_a_line_is_said_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("packing", 1200) as bar:
        for _ in range(1200):
            bar.advance()
    heard = capsys.readouterr()
    assert heard.err == "packing 1,200/1,200  0 s left\n"
    assert heard.out == ""


def test_without_a_terminal_lines_come_now_and_then(capsys, monkeypatch) -> None:
    monkeypatch.setattr(Bar, "SECONDS_BETWEEN_LINES", -1.0)
    with progress("training", 10, done=7) as bar:
        bar.note("loss 2.5")
        bar.advance()
        bar.advance(2)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"training 8/10  \d+ s left  loss 2\.5", first)
    assert last == "training 10/10  0 s left  loss 2.5"


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 2, quiet=True) as bar:
        bar.note("loss")
        bar.advance(2)
        bar.say("scores")
    heard = capsys.readouterr()
    assert heard.out == heard.err == ""


def test_quiet_is_silent_on_a_terminal_too(terminal: io.StringIO) -> None:
    with progress("training", 2, quiet=True) as bar:
        bar.advance(2)
        bar.say("scores")
    assert terminal.getvalue() == ""


def test_messages_are_printed_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 1) as bar:
        # Rich took [a] for a style and left it out, before.
        bar.say("runs/[a]: " + "long " * 60 + "[/b]")
    assert capsys.readouterr().err == "runs/[a]: " + "long " * 60 + "[/b]\n"


def test_messages_go_to_the_current_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console().print("first")
    assert capsys.readouterr().err == "first\n"
    console().print("second")
    assert capsys.readouterr().err == "second\n"


def test_a_bar_inside_another_works_on_a_terminal(terminal: io.StringIO) -> None:
    with progress("training", 2) as outer:
        outer.note("loss 2.5")
        outer.advance()
        with progress("validation", 3) as inner:
            inner.advance(3)
            inner.say("a caption")
        outer.say("step 1")
        outer.advance()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for text in ("training", "validation", "3/3", "a caption\n", "step 1\n", "2/2", "loss 2.5"):
        assert text in shown


def test_output_printed_during_a_progress_bar_reaches_its_pipe(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `attend --split val > pages.txt` left the file empty and drew a bar on the terminal.
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    with progress("attention", 1) as bar:
        print("page-001.png")
        bar.advance()
    with spinner("captioning"):
        print("page-002.png")
    assert piped.getvalue() == "page-001.png\npage-002.png\n"
    assert "page" not in terminal.getvalue()


def test_a_bar_goes_when_what_it_shows_fails(terminal: io.StringIO) -> None:
    def fail() -> None:
        with progress("training", 2) as bar:
            bar.advance()
            raise RuntimeError("broken")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            fail()
    with progress("training", 2) as bar:
        bar.advance(2)
    assert "2/2" in terminal.getvalue()
