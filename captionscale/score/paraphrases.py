"""Filter METEOR's paraphrase table for given texts.

The whole table has 5.3 million pairs of phrases, and METEOR needs ten seconds and a gigabyte to load it. A
pair matters only if one of its phrases is in a candidate and the other in a reference: the other pairs are
dropped, which changes no digit. (FilterParaphrase in METEOR's jar is slower than loading the whole table.)

METEOR's own tokenizer (Normalizer in its jar) splits, replaces or drops punctuation. It keeps runs of the
letters a to z and digits, except single dots, which it drops ("u.s." becomes "us"). Phrases are looked up by
these runs, so some pairs are kept that match nowhere, but none is dropped that matches.
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

# Most runs in a phrase that is looked up; the few longer phrases of the table are always kept.
_LONGEST = 7

_END, _SPACE = b"\n "
# Any odd number has an inverse modulo 2**64.
_MULTIPLIER = 0x9E3779B97F4A7C15
_SIEVE_BITS = 24
# Lines hashed together: the sums take eight bytes for each letter.
_LINES = 4096

_DOTS = re.compile(rb"\.\.+")
_RUN = re.compile(rb"[a-z0-9]+")
_PIECE = 1 << 17
# They filter blocks of the table while it is decompressed; NumPy releases the GIL.
_THREADS = 3
_ODD = bytes(letter not in b"abcdefghijklmnopqrstuvwxyz0123456789 \n" for letter in range(256))


class PhraseIndex:
    """All n-grams of runs of letters and digits in texts, and the empty one.

    Only hashes are stored, as millions of phrases would take a gigabyte. A collision keeps a pair that
    matches nowhere.
    """

    def __init__(self, texts: Iterable[str]):
        """Find the n-grams of these texts."""
        lines = [b" ".join(runs) for runs in {_runs(text.lower().encode()) for text in texts}]
        blocks = (b"\n".join([*lines[at : at + _LINES], b""]) for at in range(0, len(lines), _LINES))
        empty = np.zeros(1, np.uint64)
        self._hashes = np.unique(np.concatenate([empty, *(np.unique(_n_grams(block)) for block in blocks)]))
        self._sieve = np.zeros(1 << _SIEVE_BITS, bool)
        self._sieve[_positions(self._hashes)] = True

    def may_contain(self, hashes: UInt64[np.ndarray, "phrase"]) -> Bool[np.ndarray, "phrase"]:
        """Return whether phrases are in the index, fast, with false positives."""
        held: Bool[np.ndarray, "phrase"] = self._sieve[_positions(hashes)]
        return held

    def contains(self, phrases: Sequence[bytes]) -> Bool[np.ndarray, "phrase"]:
        """Return whether phrases are in the index."""
        _, _, hashes = _lines(b"\n".join([*phrases, b""]) if phrases else b"")
        at = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        held: Bool[np.ndarray, "phrase"] = self._hashes[at] == hashes
        return held


def filter_table(
    references: PhraseIndex, candidates: PhraseIndex | None, stopped: Callable[[], bool] = lambda: False
) -> list[bytes]:
    """Return the entries of METEOR's table that can match these texts, in its format and order.

    Args:
        references: Phrases of the references.
        candidates: Phrases of the candidates; None: any candidate.
        stopped: Called repeatedly; once true, the result is empty and of no use.

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
        # Phrases with other characters are looked up by another key than their own text.
        odd = np.searchsorted(ends, np.flatnonzero(np.frombuffer(block.translate(_ODD), bool)))
        hits[odd[odd % 3 > 0] // 3] = True
        entries = np.flatnonzero(hits)
        a, b = ([_key(block[starts[line] : ends[line]]) for line in 3 * entries + side] for side in (1, 2))
        if candidates is None:
            kept = references.contains(a) | references.contains(b)
        else:
            kept = candidates.contains(a) & references.contains(b)
            kept |= candidates.contains(b) & references.contains(a)
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


def _positions(hashes: UInt64[np.ndarray, "phrase"]) -> UInt64[np.ndarray, "phrase"]:
    """Return the positions of phrases in the sieve."""
    return hashes * np.uint64(_MULTIPLIER) >> np.uint64(64 - _SIEVE_BITS)


def _n_grams(block: bytes) -> UInt64[np.ndarray, "phrase"]:
    """Return the hashes of the n-grams of each line's words."""
    letters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((letters == _END) | (letters == _SPACE))
    starts = np.append(0, ends[:-1] + 1)
    lines = np.cumsum(letters[ends] == _END)
    # The last word of a line belongs to it.
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
    """Return the start, end and hash of each line."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _END)
    starts = np.append(0, ends[:-1] + 1)[: len(ends)]
    return starts, ends, _hashes(block, starts, ends)


def _hashes(
    block: bytes, starts: Int64[np.ndarray, "part"], ends: Int64[np.ndarray, "part"]
) -> UInt64[np.ndarray, "part"]:
    """Return a polynomial hash of each part of a block."""
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
    """Return the key of a phrase; for most it is the phrase itself."""
    runs = _runs(phrase)
    # Without a key, or with too long a one, a phrase is always kept.
    return b" ".join(runs) if len(runs) <= _LONGEST else b""


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield blocks of the table: whole entries of three lines, a weight and two phrases."""
    unpack, rest = zlib.decompressobj(wbits=31), b""
    try:
        with path.open("rb") as file, ThreadPoolExecutor(1) as thread:

            def decompress_next() -> bytes:
                return unpack.decompress(file.read(_PIECE))

            # The next piece is decompressed while this one is filtered.
            following = thread.submit(decompress_next)
            while piece := following.result():
                following = thread.submit(decompress_next)
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
