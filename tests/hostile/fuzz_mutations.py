"""Mutations of bytes and of nested lists and dicts, and values that few readers expect."""

import copy
import os
from collections.abc import Iterator
from random import Random
from typing import Any

CANARY = "pickle-ran"
"""File that a pickle makes in the working directory if it is ever executed."""
MARKUP = "<script>alert(1)</script>"
"""Must be escaped in every page."""
PATHS = (
    "../escaped",
    "../secret",
    "/dev/zero",
    "file:../secret",
    "http://127.0.0.1:9/x",
    "simplecache::file:../secret",
)
NUMBERS = (-1, 0, 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 20_000, 100_000, 10**6)
_FLOATS = (float("nan"), float("inf"), float("-inf"), -0.0, 0.5, 1e308, 1e-320)
_TEXTS = (
    "",
    " ",
    "\0",
    "\ud800",
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b31m",
    "a\rb",
    "a\nb",
    "é\u2028x",
    "x" * 100_000,
    MARKUP,
    "$(id)",
)
_TREES = ([], {}, [[]], [None], {"a": 1}, {"__class__": "x"}, [1, 2, 3, 4], [[0] * 3] * 3)


class Pickled:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (CANARY,)


def nasty(rng: Random, like: Any = None) -> Any:
    """Return a value that few readers expect; half of the time of the type of another value."""
    kinds = {int: NUMBERS, float: (*_FLOATS, *NUMBERS), str: (*_TEXTS, *PATHS)}
    if rng.random() < 0.5 and type(like) in kinds:
        return rng.choice(kinds[type(like)])
    depth: Any = 0
    for _ in range(rng.choice((50, 300))):
        depth = [depth]
    pools = (NUMBERS, _FLOATS, _TEXTS, PATHS, _TREES, (None, True, False, depth))
    return copy.deepcopy(rng.choice(rng.choice(pools)))


def mutate_tree(rng: Random, tree: Any) -> tuple[Any, str]:
    """Return a changed copy of nested lists and dicts, and what was changed."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places or rng.random() < 0.03:
        value = nasty(rng)
        return value, f"root = {value!r:.40}"
    holder, key, path = rng.choice(places)
    value, change = (
        nasty(rng, holder[key]),
        rng.choice(("set",) * 5 + ("delete", "rename", "repeat", "add", "wrap")),
    )
    if change == "set":
        change, holder[key] = f"{value!r:.60} as", value
    elif change == "delete":
        del holder[key]
    elif change == "rename" and isinstance(holder, dict):
        holder[rng.choice(("x", "", f"{key} ", "\x1b[31m", MARKUP, "a\nb", "\0"))] = holder.pop(key)
    elif change == "repeat" and isinstance(holder, list):
        holder[:0] = [holder[key]] * rng.choice((1, 100))
    elif change == "wrap":
        holder[key] = [holder[key]]
    elif isinstance(holder, dict):
        change, holder["extra\x1b[1m"] = f"{value!r:.60} beside", value
    else:
        change = f"{value!r:.60} in the list of"
        holder.append(value)
    return tree, f"{change} {path}"


def _places(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key, f"{path}/{key}"
        yield from _places(tree[key], f"{path}/{key}")


def mutate_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Return changed bytes, and what was changed."""
    size = len(data)
    place = rng.choice((0, rng.randrange(size + 1), min(size, rng.randrange(64))))
    span = rng.choice((1, 8, 512))
    before, after = data[:place], data[place:]
    flipped = before + bytes([byte ^ 1 << rng.randrange(8) for byte in after[:span]]) + after[span:]
    change, found = rng.choice(
        [
            *[("flip", flipped)] * 3,
            ("cut", before),
            ("insert", before + rng.randbytes(span) + after),
            ("zero", before + bytes(span) + after[span:]),
            ("remove", before + after[span:]),
            ("repeat", before + before[-200:] + after),
            ("append", data + rng.randbytes(span)),
            ("empty", b""),
            ("mark", b"\xef\xbb\xbf" + data),
            ("not UTF-8", before + b"\xff\xfe\xed\xa0\x80" + after),
            ("escape", before + b"\x1b[2J\x9b" + after),
            ("deep", b"[" * 100_000),
            ("deep here", before + b"[" * 5_000 + after),
            ("line ends", data.replace(b"\n", b"\r\n")),
        ]
    )
    return found, f"{change} at {place} of {size}, {span}"
