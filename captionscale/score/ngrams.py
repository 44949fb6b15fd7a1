"""Match n-grams of candidates and references by bit masks, for BLEU, ROUGE-L and CIDEr-D.

Words are integers. For each word of a candidate, bit i of a mask is set if word i of the reference is the
same. Shifted masks joined by AND are the matches of an n-gram, and their bit count is how often the reference
contains it: nothing is sorted or looked up, whatever the vocabulary. Texts of up to 64 words fit machine
integers; longer ones use Python's, in the same arrays and by the same code.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, count

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped

MAX_ORDER = 4

# Widths of masks, the cheapest first, and their types; Python integers hold longer ones.
_BITS = np.array([8, 12, 16, 20, 24, 32, 64])
_MASKS = (np.uint8, np.uint16, np.uint16, np.uint32, np.uint32, np.uint32, np.uint64, np.object_)

# A padding word that occurs in no text of 16-bit words.
_PADDING = 2**16 - 1

# Masks of a block, few enough to stay in a core's cache.
_CELLS = 2**16


@dataclass(frozen=True)
class Texts:
    """Concatenated texts of integer words; text i is `words[starts[i] : starts[i + 1]]`."""

    words: Int[np.ndarray, "word"]
    starts: Int[np.ndarray, "text_and_end"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Texts":
        """Return texts from lists of words."""
        starts = np.cumsum([0, *map(len, rows)])
        return cls(np.fromiter(chain.from_iterable(rows), np.int32, starts[-1]), starts)

    @cached_property
    def lengths(self) -> Int[np.ndarray, "text"]:
        """Number of words of each text."""
        return np.diff(self.starts)

    @cached_property
    def left(self) -> Int[np.ndarray, "word"]:
        """Number of words from each word to the end of its text."""
        return np.repeat(self.starts[1:], self.lengths) - np.arange(len(self.words))

    @cached_property
    def short(self) -> Integer[np.ndarray, "word"]:
        """The words, in 16 bits if they fit: half the bytes to compare."""
        return self.words.astype(np.uint16) if self.words.max(initial=0) < _PADDING else self.words

    def positions(
        self, which: Int[np.ndarray, "*rest row"], width: int
    ) -> Int[np.ndarray, "*rest position row"]:
        """Return the indices of the first `width` words of texts, also past the end of shorter ones."""
        starts = self.starts[which][..., None, :]
        positions: Int[np.ndarray, "*rest position row"] = starts + np.arange(width)[:, None]
        return positions

    def rows(
        self, which: Int[np.ndarray, "*rest row"], width: int
    ) -> Integer[np.ndarray, "*rest position row"]:
        """Return the first `width` words of texts; past the end of a shorter one they are arbitrary."""
        positions = self.positions(which, width)
        if not len(self.words):
            return np.zeros(positions.shape, np.uint16)
        return self.short.take(positions, mode="clip")


@dataclass(frozen=True)
class Groups:
    """The references of each image; those of image i are `texts[starts[i] : starts[i + 1]]`."""

    texts: Texts
    starts: Int[np.ndarray, "image_and_end"]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Sequence[int]]]) -> "Groups":
        """Return references from lists of words, at least one for each image (ValueError)."""
        return cls(Texts.of([*chain.from_iterable(groups)]), _offsets(groups))


@dataclass(frozen=True)
class Block:
    """Candidates with equally many references each, compared; text 0 is the candidate itself.

    Attributes:
        rows: The candidates' indices.
        texts: The references' indices.
        lengths: Words of each text.
        masks: For each text and position in the candidate, the positions in the text of the candidate's word;
            arbitrary past the candidate's end.
    """

    rows: Int[np.ndarray, "row"]
    texts: Int[np.ndarray, "reference row"]
    lengths: Int[np.ndarray, "text row"]
    masks: Shaped[np.ndarray, "text position row"]

    def n_grams(
        self,
    ) -> tuple[Integer[np.ndarray, "n text position row"], Bool[np.ndarray, "n position row"]]:
        """Count the candidate's n-grams in each text, by the position where they begin, for n from 1 to 4.

        Also return whether an n-gram begins there for the first time; elsewhere the count is arbitrary.
        """
        width = self.masks.shape[1]
        found = np.zeros((MAX_ORDER, *self.masks.shape), self.masks.dtype)
        found[0] = self.masks
        for n in range(1, min(MAX_ORDER, width)):
            np.bitwise_and(found[n - 1, :, :-n], self.masks[:, n:] >> n, out=found[n, :, :-n])
        # Counting bits is slow, and needed only where a word occurs twice: n-grams are no more frequent.
        counts = (found != 0).astype(np.int64) if found.dtype == object else (found != 0).view(np.uint8)
        several = np.flatnonzero(self.masks & (self.masks - self.masks.dtype.type(1)) != 0)
        flat = (MAX_ORDER, -1)
        counts.reshape(flat)[:, several] = np.bitwise_count(found.reshape(flat)[:, several])
        before = low_bit_masks(np.arange(width), found.dtype)[:, None]
        inside = np.arange(width)[:, None] + np.arange(MAX_ORDER)[:, None, None] < self.lengths[0]
        return counts, inside & (found[:, 0] & before == 0)


def low_bit_masks(bits: Int[np.ndarray, "*any"], dtype: np.dtype) -> Shaped[np.ndarray, "*any"]:
    """Return masks of the given numbers of low bits."""
    masks = (1 << np.arange(bits.max(initial=0) + 1, dtype=object)) - 1
    return masks.astype(dtype).take(bits)


def blocks(
    candidates: Texts, references: Groups, images: Int[np.ndarray, "candidate"] | None = None
) -> Iterator[Block]:
    """Yield all candidates in blocks of similar size.

    Args:
        candidates: Texts.
        references: To compare them with.
        images: The index of each candidate's image in the references; None: compare with no reference.
    """
    longest, counts = candidates.lengths, np.zeros(len(candidates.lengths), np.int64)
    first = counts
    if images is not None and len(images):
        first, counts = references.starts[images], np.diff(references.starts)[images]
        lengths = references.texts.lengths[_runs(first, counts)]
        longest = np.maximum(longest, np.maximum.reduceat(lengths, np.cumsum(counts) - counts))
    kinds = np.searchsorted(_BITS, longest)
    order = np.lexsort((candidates.lengths, longest, counts))
    changes = (np.diff(kinds[order]) != 0) | (np.diff(counts[order]) != 0)
    for similar in np.split(order, np.flatnonzero(changes) + 1):
        if not len(similar):
            return
        others, longest_here = int(counts[similar[0]]), int(longest[similar[-1]])
        rows_at_once = max(1, _CELLS // ((1 + others) * max(1, longest_here)))
        for start in range(0, len(similar), rows_at_once):
            rows = similar[start : start + rows_at_once]
            texts = first[rows] + np.arange(others)[:, None]
            yield _block(candidates, references.texts, rows, texts, _MASKS[kinds[rows[0]]])


def _block(
    candidates: Texts,
    references: Texts,
    rows: Int[np.ndarray, "row"],
    texts: Int[np.ndarray, "reference row"],
    dtype: type[np.generic],
) -> Block:
    lengths = np.concatenate([candidates.lengths[rows][None], references.lengths[texts]])
    width, own_width = int(lengths.max(initial=0)), int(lengths[0].max(initial=0))
    words = np.concatenate([candidates.rows(rows, width)[None], references.rows(texts, width)])
    # No word has this number where both candidates and references have 16 bits.
    padding = words.dtype.type(_PADDING if words.dtype == np.uint16 else -1)
    own = np.where(np.arange(own_width)[:, None] < lengths[0], words[0, :own_width], padding)
    masks = np.zeros((len(words), *own.shape), dtype)
    equal, byte = np.empty(masks.shape, bool), np.empty(masks.shape, np.uint8)
    # Eight positions at a time, the last first: bytes are faster than wider masks.
    for start in reversed(range(0, width, 8)):
        byte.fill(0)
        for position in reversed(range(start, min(start + 8, width))):
            np.equal(words[:, position, None], own, out=equal)
            np.add(byte, byte, out=byte)
            np.bitwise_or(byte, equal.view(np.uint8), out=byte)
        masks = byte.astype(dtype) | (masks << 8 if start + 8 < width else 0)
    masks &= low_bit_masks(lengths, masks.dtype)[:, None]
    return Block(rows, texts, lengths, masks)


@dataclass(frozen=True)
class EncodedCorpus:
    """Candidates and the references of their images."""

    candidates: Texts
    references: Groups

    @cached_property
    def blocks(self) -> list[Block]:
        """All candidates, each compared with its references."""
        images = np.arange(len(self.candidates.lengths))
        return list(blocks(self.candidates, self.references, images))


def encode_corpus(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, by_spaces: bool = False
) -> EncodedCorpus:
    """Return a candidate and references for each image as integers; the last corpus is cached.

    Args:
        candidates: Tokenized.
        references: Tokenized.
        by_spaces: Split at each single space, so words may be empty; else at any white space.

    Raises:
        ValueError: Different numbers of images, or an image without a reference.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} images, expected one for each")
    by_space, by_white_space = _encode(tuple(candidates), tuple(map(tuple, references)))
    return by_space if by_spaces else by_white_space


@lru_cache(maxsize=1)
def _encode(
    candidates: tuple[str, ...], references: tuple[tuple[str, ...], ...]
) -> tuple[EncodedCorpus, EncodedCorpus]:
    """Return texts split at single spaces, and at white space."""
    numbers: defaultdict[str, int] = defaultdict(count().__next__)
    texts = [*candidates, *chain.from_iterable(references)]
    offsets = _offsets(references)

    def corpus(split: list[list[str]]) -> EncodedCorpus:
        encoded = [[*map(numbers.__getitem__, words)] for words in split]
        own, others = encoded[: len(candidates)], encoded[len(candidates) :]
        return EncodedCorpus(Texts.of(own), Groups(Texts.of(others), offsets))

    by_spaces, by_white_space = [text.split(" ") for text in texts], [text.split() for text in texts]
    spaced = corpus(by_spaces)
    return spaced, spaced if by_white_space == by_spaces else corpus(by_white_space)


def _offsets(groups: Sequence[Sequence[object]]) -> Int[np.ndarray, "image_and_end"]:
    """Return the index of each image's first reference in a list of all; each needs one (ValueError)."""
    sizes = [*map(len, groups)]
    if 0 in sizes:
        raise ValueError(f"image {sizes.index(0)} in order has no reference, expected one or more")
    return np.cumsum([0, *sizes])


def _runs(starts: Int[np.ndarray, "run"], sizes: Int[np.ndarray, "run"]) -> Int[np.ndarray, "number"]:
    """Return start, start + 1, ... of all runs, concatenated."""
    runs: Int[np.ndarray, "number"] = np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
    runs += np.arange(len(runs))
    return runs
