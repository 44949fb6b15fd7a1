"""JSON, JSON lines and TOML from anywhere: what cannot be read is a ValueError whose text is one line."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from captionscale.escape import for_terminal

_BOM = b"\xef\xbb\xbf"
_MAX_DEPTH = 64
_MAX_FAULT = 120
"""Length of an error's text: damaged files have names of megabytes."""
_TOO_DEEP = "nested too deeply"

T = TypeVar("T")


def decode(data: bytes | memoryview, decoder: msgspec.json.Decoder[T]) -> T:
    """Return JSON (UTF-8) as the decoder's type, which has no `Any`; NaN and Infinity are refused.

    Raises:
        ValueError: It is not JSON, or has another layout.
    """
    # A view: a copy of a large file would take its size again.
    view = memoryview(data)
    try:
        return decoder.decode(view[len(_BOM) :] if view[: len(_BOM)] == _BOM else view)
    except msgspec.ValidationError as error:
        raise ValueError(describe_error(error)) from None
    except RecursionError:
        raise ValueError(f"not JSON: {_TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def loads(data: bytes | str) -> Any:
    """Return JSON as Python objects, NaN and Infinity included.

    Raises:
        ValueError: It is not JSON, or nested deeper than anything that captionscale reads.
    """
    try:
        # Left to itself, json guesses UTF-16 and UTF-32 too.
        tree = json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [tree]
    for _ in range(_MAX_DEPTH):
        nodes = [node for node in level if isinstance(node, dict | list)]
        level = [child for node in nodes for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return tree
    raise ValueError(_TOO_DEEP)


def toml(text: str) -> dict[str, Any]:
    """Return a TOML document.

    Raises:
        ValueError: It is not TOML, or nested too deeply.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def convert(tree: Any, kind: type[T], dec_hook: Callable[[type, Any], Any] | None = None) -> T:
    """Return parsed JSON as a type; `dec_hook` makes values of types that msgspec does not know.

    Raises:
        ValueError: It has another layout.
    """
    try:
        return msgspec.convert(tree, kind, dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        raise ValueError(describe_error(error)) from None


def describe_error(error: msgspec.ValidationError) -> str:
    """Return where in its JSON a value is not what was expected, and why, in one line."""
    fault, _, where = str(error).rpartition(" - at `$")
    if not fault:
        fault, where = str(error), ""
    # It may quote the file.
    fault = for_terminal(" ".join(fault.split()))
    place = where.removesuffix("`").removeprefix(".")
    return f"{place}: {fault[:_MAX_FAULT]}" if place else fault[:_MAX_FAULT]


@dataclass(frozen=True)
class Lines(Generic[T]):
    """The lines of a file that could be read, and those that could not."""

    valid: list[tuple[bytes, T]]
    """Each as it is in the file, and as it was read."""
    damaged: list[tuple[int, bytes]]
    """Each with its number, from 1."""

    def warning(self, place: object) -> str:
        """Return one line that names what was skipped; nothing if all lines are whole."""
        if not self.damaged:
            return ""
        count, first = len(self.damaged), self.damaged[0][0]
        return f"{place}: skipped {count:,} damaged line{'s' * (count > 1)}, the first is line {first:,}"


def read_lines(data: bytes, read: Callable[[bytes], T]) -> Lines[T]:
    """Read JSON lines by a function that raises ValueError for a damaged one.

    A last line without its end, which a killed process leaves, is not damaged: it is left out.
    """
    found = Lines[T]([], [])
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        raw = line.rstrip(b"\r\n")
        if not raw:
            continue
        try:
            found.valid.append((raw, read(raw)))
        except ValueError:
            if raw != line:
                found.damaged.append((number, raw))
    return found
