"""How far something is, shown to people."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Timer
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from captionscale.escape import for_terminal, for_terminal_lines
from captionscale.terminal import innermost, safe_streams

SHORT_S = 2.0
"""What takes no longer needs no word."""


class SafeConsole(Console):
    """A console that escapes control characters of what it shows; colours and cursor moves are its own."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, **options)

    @property
    def file(self) -> Any:
        """The stream below all wrappers, as they would escape colours."""
        return innermost(self._file or (sys.stderr if self.stderr else sys.stdout))

    @file.setter
    def file(self, new_file: Any) -> None:
        self._file = new_file

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape before rich measures how wide the text is."""
        return super().render_str(for_terminal_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Escape what was no plain text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else for_terminal_lines(text), style, control)


@cache
def console() -> SafeConsole:
    """Return where people read: the standard error, so that results can be piped."""
    return SafeConsole(stderr=True)


def say(*lines: str) -> None:
    """Tell people one thing, mostly in one line."""
    console().print("\n".join(map(for_terminal, lines)), soft_wrap=True)


@contextmanager
def progress(
    title: str,
    total: int,
    done: int = 0,
    *,
    quiet: bool = False,
    transient: bool = False,
    lines: bool = False,
) -> Iterator["Bar"]:
    """Show how far something is: a bar on a terminal, now and then a line elsewhere.

    Args:
        title: What is going on.
        total: Of the things to do.
        done: Already.
        quiet: Show nothing; for ranks other than the first.
        transient: Take the bar away at the end; without a terminal, say nothing of what is soon done.
        lines: On a terminal too, as other threads do such things at the same time.
    """
    out = console()
    if quiet or lines or not out.is_terminal:
        yield Bar(title, total, done, None if quiet else out, SHORT_S if transient else 0.0)
        return
    columns = (
        _text("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        _text("{task.fields[note]}"),
    )
    with _bars(*columns, transient=transient) as bars:
        bar = Bar(title, total, done, out)
        bar.attach(bars)
        yield bar


@contextmanager
def spinner(title: str, *, quiet: bool = False) -> Iterator[None]:
    """Show that something goes on of which nobody knows how long it takes.

    On a terminal until it is done; elsewhere in one line, when it has taken some seconds.

    Args:
        title: What is going on.
        quiet: Show nothing; for ranks other than the first.
    """
    out = console()
    if quiet:
        yield
    elif out.is_terminal:
        columns = (SpinnerColumn(), _text("{task.description}"), TimeElapsedColumn())
        with _bars(*columns, transient=True) as bars:
            bars.add_task(for_terminal(title), total=None)
            yield
    else:
        timer = Timer(SHORT_S, say, [f"{title} ..."])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _text(form: str) -> TextColumn:
    # A title may hold brackets, which are no markup.
    return TextColumn(form, markup=False)


@contextmanager
def _bars(*columns: ProgressColumn, transient: bool) -> Iterator[Progress]:
    # What is printed meanwhile stands above the bar; but a pipe or a file is to have it nonetheless.
    here = sys.stdout.isatty()
    bars = Progress(*columns, console=console(), transient=transient, redirect_stdout=here)
    # rich would take control sequences of what is printed meanwhile for colours.
    with bars, safe_streams():
        yield bars


class Bar:
    """How far something is."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, title: str, total: int, done: int, out: Console | None, least_s: float = 0.0):
        self._title, self._total, self._done, self._out = for_terminal(title), total, done, out
        self._least_s = least_s
        self._note = ""
        self._bars: Progress | None = None
        self._started = self._spoke = time.monotonic()
        self._start = done

    def attach(self, bars: Progress) -> None:
        """Draw on a terminal from now on."""
        self._bars = bars
        self._task = bars.add_task(self._title, total=self._total, completed=self._done, note="")

    def note(self, text: str) -> None:
        """Change what stands behind the bar."""
        self._note = for_terminal(text)

    def advance(self, count: int = 1) -> None:
        """Count things done."""
        self._done += count
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, note=self._note)
            return
        now = time.monotonic()
        due = now - self._spoke > self.SECONDS_BETWEEN_LINES
        if self._out is not None and (
            due or (self._done == self._total and now - self._started >= self._least_s)
        ):
            self._spoke = now
            pace = (now - self._started) / max(1, self._done - self._start)
            left = f"{pace * (self._total - self._done):,.0f} s left"
            parts = [f"{self._title} {self._done:,}/{self._total:,}", left, self._note]
            self._out.print("  ".join(part for part in parts if part), soft_wrap=True)

    def say(self, *lines: str) -> None:
        """Print lines above the bar."""
        if self._out is not None:
            self._out.print("\n".join(map(for_terminal, lines)), soft_wrap=True)


def format_duration(value: float) -> str:
    """Return a number of seconds for people.

    Examples:
        >>> format_duration(0.25), format_duration(42.0), format_duration(3700.0), format_duration(200_000.0)
        ('0.2 s', '42 s', '1 h 02 min', '2 d 07 h')
    """
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"
