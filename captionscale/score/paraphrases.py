"""Filter METEOR's paraphrase table for given texts.

All 5.3 million pairs of phrases take ten seconds and a gigabyte. A pair matters only if one phrase is in a
candidate and the other in a reference: the others are dropped, which changes no digit.
"""

import gzip
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt64
from pycocoevalcap.meteor import meteor

from captionscale.errors import UserError

# No phrase of the table has more words, except some that are always kept.
_MAX_WORDS = 7

_NEWLINE, _SPACE = b"\n "
_MULTIPLIER = 0x9E3779B97F4A7C15
_SIEVE_BITS = 24
_BYTES = 8
_MASKS = np.frombuffer(
    b"".join(b"\xff" * count + bytes(_BYTES - count) for count in range(_BYTES + 1)), np.uint64
)
"""Of so many first bytes of eight."""
# Lines hashed together.
_LINES = 4096
_BLOCK_BYTES = 1 << 17
# They filter blocks while others are decompressed; zlib and NumPy release the GIL.
_THREADS = 3

# METEOR's own tokenizer (Normalizer in its jar) keeps runs of letters and digits, except that it drops single
# dots: "u.s." becomes "us". Other characters split texts, so a few pairs are kept that match nowhere.
_DOTS = re.compile(rb"\.\.+")
_RUN = re.compile(rb"[a-z0-9]+")
_OTHER = bytes(byte not in b"abcdefghijklmnopqrstuvwxyz0123456789 \n" for byte in range(256))


class PhraseIndex:
    """Hashes of all n-grams of up to seven words in texts; a collision keeps a pair that matches nowhere."""

    def __init__(self, texts: Iterable[str]):
        """Hash the n-grams of these texts."""
        lines = list({b" ".join(_RUN.findall(_without_dots(text.lower().encode()))) for text in texts})
        blocks = (b"\n".join([*lines[at : at + _LINES], b""]) for at in range(0, len(lines), _LINES))
        none = np.zeros(0, np.uint64)
        self._hashes = np.unique(np.concatenate([none, *(np.unique(_n_grams(block)) for block in blocks)]))
        # Most phrases are not in the index, and the sieve is faster than a search.
        self._sieve = np.zeros(1 << _SIEVE_BITS, bool)
        self._sieve[_sieve_positions(self._hashes)] = True

    def contains(self, hashes: UInt64[np.ndarray, "phrase"]) -> Bool[np.ndarray, "phrase"]:
        """Return whether phrases are in the index."""
        found: Bool[np.ndarray, "phrase"] = self._sieve[_sieve_positions(hashes)]
        rest = np.flatnonzero(found)
        at = np.searchsorted(self._hashes, hashes[rest])
        found[rest] = self._hashes[at.clip(max=len(self._hashes) - 1)] == hashes[rest]
        return found


def filter_table(
    references: Iterable[str],
    candidates: Iterable[str] | None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[bytes]:
    """Return the entries of METEOR's table that can match these texts, in its format and order.

    Args:
        references: Tokenized.
        candidates: Tokenized; None: any candidate.
        stopped: Called repeatedly; once true, the result is empty and of no use.

    Raises:
        UserError: The table is missing or damaged.
    """
    others = PhraseIndex(references)
    own = None if candidates is None else PhraseIndex(candidates)

    def matching(block: bytes) -> list[bytes]:
        starts, ends, hashes = hash_lines(block)
        left, right = hashes[1::3], hashes[2::3]
        if own is None:
            kept = others.contains(left) | others.contains(right)
        else:
            kept = own.contains(left) & others.contains(right)
            kept |= own.contains(right) & others.contains(left)
        # METEOR splits phrases with other characters in its own way: they are always kept.
        other = np.searchsorted(ends, np.flatnonzero(np.frombuffer(block.translate(_OTHER), bool)))
        kept[other[other % 3 > 0] // 3] = True
        return [block[starts[3 * entry] : ends[3 * entry + 2] + 1] for entry in np.flatnonzero(kept)]

    kept: list[bytes] = []
    waiting: deque[Future[list[bytes]]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for block in _blocks(Path(meteor.__file__).with_name("data") / "paraphrase-en.gz"):
            waiting.append(threads.submit(matching, block))
            if stopped():
                return []
            if len(waiting) > _THREADS:
                kept += waiting.popleft().result()
        for future in waiting:
            kept += future.result()
    return kept


def hash_lines(
    block: bytes,
) -> tuple[Int64[np.ndarray, "line"], Int64[np.ndarray, "line"], UInt64[np.ndarray, "line"]]:
    """Return the start, end and hash of each line."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE)
    starts = np.append(0, ends[:-1] + 1)[: len(ends)]
    return starts, ends, _hashes(block, starts, ends)


def _sieve_positions(hashes: UInt64[np.ndarray, "phrase"]) -> UInt64[np.ndarray, "phrase"]:
    return hashes * np.uint64(_MULTIPLIER) >> np.uint64(64 - _SIEVE_BITS)


def _without_dots(text: bytes) -> bytes:
    return _DOTS.sub(b" ", text).replace(b".", b"")


def _n_grams(block: bytes) -> UInt64[np.ndarray, "phrase"]:
    """Return the hashes of the n-grams of each line's words."""
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((characters == _NEWLINE) | (characters == _SPACE))
    starts = np.append(0, ends[:-1] + 1)
    line_of = np.cumsum(characters[ends] == _NEWLINE)
    # The last word of a line belongs to it.
    line_of -= characters[ends] == _NEWLINE
    found = []
    for longer in range(_MAX_WORDS):
        count = max(0, len(ends) - longer)
        within = np.flatnonzero(line_of[:count] == line_of[longer:])
        found.append(_hashes(block, starts[within], ends[within + longer]))
    return np.concatenate(found)


def _hashes(
    block: bytes, starts: Int64[np.ndarray, "part"], ends: Int64[np.ndarray, "part"]
) -> UInt64[np.ndarray, "part"]:
    """Return a hash of the length and the first, middle and last eight bytes of each part of a block."""
    # The eight bytes from each on.
    eights = np.ndarray(len(block), np.uint64, block + bytes(_BYTES), strides=(1,))
    lengths = ends - starts
    mask, last = _MASKS[lengths.clip(max=_BYTES)], np.maximum(starts, ends - _BYTES)
    hashes: UInt64[np.ndarray, "part"] = lengths.astype(np.uint64)
    for places in (starts, (starts + last) // 2, last):
        hashes = hashes * np.uint64(_MULTIPLIER) + (eights[places] & mask)
    return hashes


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield blocks of the table: whole entries of three lines, a weight and two phrases."""
    rest, whole = b"", 0
    try:
        with gzip.open(path) as file:
            while piece := file.read(_BLOCK_BYTES):
                block = rest + piece
                end = len(block)
                for _ in range(block.count(b"\n") % 3 + 1):
                    end = block.rfind(b"\n", 0, end)
                whole = end + 1
                rest = block[whole:]
                yield block[:whole]
        if rest or not whole:
            raise EOFError("it is not whole")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}), but METEOR needs it; install pycocoevalcap again"
        ) from None
