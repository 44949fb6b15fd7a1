"""Standard streams that escape control characters before they reach a terminal."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from captionscale.escape import for_terminal_lines


class SafeStream:
    """A text stream that escapes control characters other than newlines and tabs."""

    def __init__(self, stream: Any):
        # rich writes its own control sequences to the attribute of this name.
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write text."""
        self.rich_proxied_file.write(for_terminal_lines(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write text in pieces."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def make_safe() -> None:
    """Wrap the standard output and the standard error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))


@contextmanager
def safe_streams() -> Iterator[None]:
    """Wrap them for a while, also where another wrapper was added meanwhile."""
    before = sys.stdout, sys.stderr
    make_safe()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def innermost(stream: Any) -> Any:
    """Return the stream below all wrappers, ours and rich's."""
    while (inner := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = inner
    return stream
