"""Progress bars and messages on the standard error."""

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
"""Shorter tasks are not reported."""


class SafeConsole(Console):
    """A console that escapes control characters of its content, but not its own colors and cursor moves."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, **options)

    @property
    def file(self) -> Any:
        """The stream below all wrappers, which would escape colors."""
        return innermost(self._file or (sys.stderr if self.stderr else sys.stdout))

    @file.setter
    def file(self, new_file: Any) -> None:
        self._file = new_file

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape before rich measures the text's width."""
        return super().render_str(for_terminal_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Escape what is not plain text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else for_terminal_lines(text), style, control)


@cache
def console() -> SafeConsole:
    """Return the console of the standard error, so that results can be piped."""
    return SafeConsole(stderr=True)


def say(*lines: str) -> None:
    """Print a message, mostly one line."""
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
    """Show progress: a bar on a terminal, a line every ten seconds elsewhere.

    Args:
        title: The task.
        total: Number of items.
        done: Items already done.
        quiet: Show nothing; for ranks other than the first.
        transient: Remove the bar at the end; without a terminal, do not report short tasks.
        lines: Print lines on a terminal too, because other threads show progress at the same time.
    """
    out = console()
    if quiet or lines or not out.is_terminal:
        yield Bar(title, total, done, None if quiet else out, min_s=SHORT_S if transient else 0.0)
        return
    columns = (
        _text("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        _text("{task.fields[note]}"),
    )
    with _bars(*columns, transient=transient) as bars:
        yield Bar(title, total, done, out, bars)


@contextmanager
def spinner(title: str, *, quiet: bool = False) -> Iterator[None]:
    """Show that a task of unknown length is running: on a terminal, or in one line after some seconds."""
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
    # Brackets in a title are not markup.
    return TextColumn(form, markup=False)


@contextmanager
def _bars(*columns: ProgressColumn, transient: bool) -> Iterator[Progress]:
    # What is printed meanwhile appears above the bar, but must still reach a pipe or a file.
    here = sys.stdout.isatty()
    bars = Progress(*columns, console=console(), transient=transient, redirect_stdout=here)
    # rich would interpret control sequences of what is printed meanwhile.
    with bars, safe_streams():
        yield bars


class Bar:
    """Progress of one task."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(
        self,
        title: str,
        total: int,
        done: int,
        out: Console | None,
        bars: Progress | None = None,
        min_s: float = 0.0,
    ):
        self._title, self._total, self._out, self._bars = for_terminal(title), total, out, bars
        self._start = self._done = done
        self._min_s, self._note = min_s, ""
        self._started = self._spoke = time.monotonic()
        if bars is not None:
            self._task = bars.add_task(self._title, total=total, completed=done, note="")

    def note(self, text: str) -> None:
        """Set the text after the bar."""
        self._note = for_terminal(text)

    def advance(self, count: int = 1) -> None:
        """Count finished items."""
        self._done += count
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, note=self._note)
            return
        now = time.monotonic()
        due = now - self._spoke > self.SECONDS_BETWEEN_LINES
        if self._out is not None and (
            due or (self._done == self._total and now - self._started >= self._min_s)
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
    """Return a duration in readable units.

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
