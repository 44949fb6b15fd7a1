"""METEOR's paraphrase table, cut down to what some texts can use.

The whole table has 5.3 million pairs of phrases, and METEOR takes ten seconds and a gigabyte to load it.  A
pair counts only where one of its phrases stands in a candidate and the other one in a reference: what is left
out here cannot, so no digit changes.  (METEOR's own jar has a tool for this, FilterParaphrase; it is slower
than loading the whole table.)

METEOR splits texts into words its own way (the class Normalizer in its jar): it parts, turns or drops
punctuation.  What it leaves alone are runs of the letters a to z and digits, but for single dots that it
drops ("u.s." becomes "us").  Phrases are looked up by these runs.  So some pairs are kept that match nowhere,
but none is left out that does.
"""

import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt64
from pycocoevalcap.meteor import meteor

from captionscale.errors import UserError

# Runs of a phrase that is looked up: no phrase of the table has more but a few that are always kept.
_LONGEST = 7

_END, _SPACE = b"\n "
# Any odd number: an inverse is all that is asked of it.
_MULTIPLIER = 0x9E3779B97F4A7C15
_SIEVE_BITS = 24
_LINES = 4096
"""That are hashed together: the sums take eight bytes for each letter."""

_DOTS = re.compile(rb"\.\.+")
_RUN = re.compile(rb"[a-z0-9]+")
_PIECE = 1 << 17
_THREADS = 3
"""That look at pieces of the table, while it is unpacked: most of it is done outside of Python."""
_ODD = bytes(letter not in b"abcdefghijklmnopqrstuvwxyz0123456789 \n" for letter in range(256))


class PhraseIndex:
    """What may be looked up in texts: all n-grams of their runs of letters and digits, and the empty one.

    Only their hashes are kept, as millions of phrases would take a gigabyte. Two phrases of one hash are
    taken for each other: a pair more is kept, which matches nowhere.
    """

    def __init__(self, texts: Iterable[str]):
        """Find the n-grams of these texts."""
        lines = [b" ".join(runs) for runs in {_runs(text.lower().encode()) for text in texts}]
        blocks = (b"\n".join([*lines[at : at + _LINES], b""]) for at in range(0, len(lines), _LINES))
        empty = np.zeros(1, np.uint64)
        self._hashes = np.unique(np.concatenate([empty, *(np.unique(_n_grams(block)) for block in blocks)]))
        self._sieve = np.zeros(1 << _SIEVE_BITS, bool)
        self._sieve[_places(self._hashes)] = True

    def may_contain(self, hashes: UInt64[np.ndarray, "phrase"]) -> Bool[np.ndarray, "phrase"]:
        """Tell of millions of phrases whether they are among these, and sometimes say yes for no."""
        held: Bool[np.ndarray, "phrase"] = self._sieve[_places(hashes)]
        return held

    def contains(self, phrases: Sequence[bytes]) -> Bool[np.ndarray, "phrase"]:
        """Tell whether phrases are among these."""
        _, _, hashes = _lines(b"\n".join([*phrases, b""]) if phrases else b"")
        at = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        held: Bool[np.ndarray, "phrase"] = self._hashes[at] == hashes
        return held


def filter_table(
    references: PhraseIndex, candidates: PhraseIndex | None, stopped: Callable[[], bool] = lambda: False
) -> list[bytes]:
    """Return the entries of METEOR's table that these texts can use, as it stores them and in its order.

    Args:
        references: Their phrases.
        candidates: Theirs; none: any candidate.
        stopped: Asked now and then: after a yes nobody wants what is returned.

    Raises:
        UserError: The table is missing or damaged.
    """

    def used(block: bytes) -> list[bytes]:
        starts, ends, hashes = _lines(block)
        left, right = hashes[1::3], hashes[2::3]
        if candidates is None:
            hits = references.may_contain(left) | references.may_contain(right)
        else:
            hits = candidates.may_contain(left) & references.may_contain(right)
            hits |= candidates.may_contain(right) & references.may_contain(left)
        # Looked up by something else than what they are.
        odd = np.searchsorted(ends, np.flatnonzero(np.frombuffer(block.translate(_ODD), bool)))
        hits[odd[odd % 3 > 0] // 3] = True
        entries = np.flatnonzero(hits)
        a, b = ([_key(block[starts[line] : ends[line]]) for line in 3 * entries + side] for side in (1, 2))
        if candidates is None:
            kept = references.contains(a) | references.contains(b)
        else:
            kept = candidates.contains(a) & references.contains(b) | candidates.contains(
                b
            ) & references.contains(a)
        return [block[starts[3 * at] : ends[3 * at + 2] + 1] for at in entries[kept]]

    kept: list[bytes] = []
    waiting: deque[Future[list[bytes]]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for block in _blocks(Path(meteor.__file__).with_name("data") / "paraphrase-en.gz"):
            waiting.append(threads.submit(used, block))
            if stopped():
                return []
            if len(waiting) > _THREADS:
                kept += waiting.popleft().result()
        while waiting:
            kept += waiting.popleft().result()
    return kept


def _places(hashes: UInt64[np.ndarray, "phrase"]) -> UInt64[np.ndarray, "phrase"]:
    """Return where in a sieve phrases are."""
    return hashes * np.uint64(_MULTIPLIER) >> np.uint64(64 - _SIEVE_BITS)


def _n_grams(block: bytes) -> UInt64[np.ndarray, "phrase"]:
    """Return the hashes of the n-grams of each line's words."""
    letters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((letters == _END) | (letters == _SPACE))
    starts = np.append(0, ends[:-1] + 1)
    lines = np.cumsum(letters[ends] == _END)
    # The word that ends a line is of that line still.
    lines -= letters[ends] == _END
    found = []
    for longer in range(_LONGEST):
        count = max(0, len(ends) - longer)
        within = np.flatnonzero(lines[:count] == lines[longer:])
        found.append(_hashes(block, starts[within], ends[within + longer]))
    return np.concatenate(found)


def _lines(
    block: bytes,
) -> tuple[Int64[np.ndarray, "line"], Int64[np.ndarray, "line"], UInt64[np.ndarray, "line"]]:
    """Return where each line begins and ends, and its hash."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _END)
    starts = np.append(0, ends[:-1] + 1)[: len(ends)]
    return starts, ends, _hashes(block, starts, ends)


def _hashes(
    block: bytes, starts: Int64[np.ndarray, "part"], ends: Int64[np.ndarray, "part"]
) -> UInt64[np.ndarray, "part"]:
    """Return a hash of each part of a block: the sum of letter i times m**i."""
    powers, inverses = _powers(1 << len(block).bit_length())
    sums = np.zeros(len(block) + 1, np.uint64)
    np.cumsum(np.frombuffer(block, np.uint8) * powers[: len(block)], out=sums[1:])
    hashes: UInt64[np.ndarray, "part"] = (sums[ends] - sums[starts]) * inverses[starts]
    return hashes


@lru_cache(maxsize=32)
def _powers(count: int) -> tuple[UInt64[np.ndarray, "power"], UInt64[np.ndarray, "power"]]:
    """Return m**0, m**1, ... and m**0, m**-1, ..., modulo 2**64."""

    def of(base: int) -> UInt64[np.ndarray, "power"]:
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return of(_MULTIPLIER), of(pow(_MULTIPLIER, -1, 1 << 64))


def _runs(text: bytes) -> tuple[bytes, ...]:
    return tuple(_RUN.findall(_DOTS.sub(b" ", text).replace(b".", b"")))


def _key(phrase: bytes) -> bytes:
    """Return what a phrase is looked up by; most hold nothing odd and stand for themselves."""
    runs = _runs(phrase)
    # Nothing to look it up by, or too much: it is kept.
    return b" ".join(runs) if len(runs) <= _LONGEST else b""


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the table piece by piece: whole entries of three lines, of which the first is the weight."""
    unpack, rest = zlib.decompressobj(wbits=31), b""
    try:
        with path.open("rb") as file, ThreadPoolExecutor(1) as thread:

            def unpacked() -> bytes:
                return unpack.decompress(file.read(_PIECE))

            # The next piece is unpacked while this one is looked at.
            following = thread.submit(unpacked)
            while piece := following.result():
                following = thread.submit(unpacked)
                block = rest + piece
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _END)
                whole = ends[len(ends) // 3 * 3 - 1] + 1 if len(ends) >= 3 else 0
                rest = block[whole:]
                if whole:
                    yield block[:whole]
    except (OSError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}), but METEOR needs it; install pycocoevalcap again"
        ) from None
    if rest or not unpack.eof or unpack.unused_data:
        raise UserError(f"{path}: is not whole, but METEOR needs it; install pycocoevalcap again")
