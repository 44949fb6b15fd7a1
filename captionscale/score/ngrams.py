"""Where the words of texts stand in other texts: what BLEU, ROUGE-L and CIDEr-D are made of.

Words are numbers.  For each word of a candidate a mask, one integer, says at which places of a reference it
stands.  An n-gram stands where its first word does if its second stands one place later, and so on: masks are
shifted and joined by AND, and a bit count is how often the n-gram is in the reference.  Nothing is sorted or
looked up, whatever the vocabulary.  Texts of up to 64 words fit machine integers; longer ones get Python's,
in the same arrays and by the same code.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, count

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped

MAX_ORDER = 4

# The bits of masks, from the cheapest on, and what holds longer ones.
_BITS = np.array([8, 12, 16, 20, 24, 32, 64])
_MASKS = (np.uint8, np.uint16, np.uint16, np.uint32, np.uint32, np.uint32, np.uint64, np.object_)

# Behind a text is a word that no text of 16 bits has, and none of 32.
_NOWHERE = 2**16 - 1

# Masks of a block: they stay in a core's cache.
_CELLS = 2**16


@dataclass(frozen=True)
class Texts:
    """Texts as word numbers, end to end.

    Attributes:
        words: Of all texts.
        starts: Where each text begins in `words`, and where the last one ends.
    """

    words: Int[np.ndarray, "word"]
    starts: Int[np.ndarray, "text_and_end"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Texts":
        """Return texts given as rows of numbers."""
        starts = np.cumsum([0, *map(len, rows)])
        return cls(np.fromiter(chain.from_iterable(rows), np.int32, starts[-1]), starts)

    @cached_property
    def lengths(self) -> Int[np.ndarray, "text"]:
        """Words of each text."""
        return np.diff(self.starts)

    @cached_property
    def left(self) -> Int[np.ndarray, "word"]:
        """Words of its text from each word on."""
        return np.repeat(self.starts[1:], self.lengths) - np.arange(len(self.words))

    @cached_property
    def short(self) -> Integer[np.ndarray, "word"]:
        """The words, in 16 bits if they fit: half as many bytes to compare."""
        return self.words.astype(np.uint16) if self.words.max(initial=0) < _NOWHERE else self.words

    def places(self, which: Int[np.ndarray, "*rest row"], width: int) -> Int[np.ndarray, "*rest place row"]:
        """Return where in `words` the first `width` words of texts are, and what is behind a shorter one."""
        places: Int[np.ndarray, "*rest place row"] = (
            self.starts[which][..., None, :] + np.arange(width)[:, None]
        )
        return places

    def rows(self, which: Int[np.ndarray, "*rest row"], width: int) -> Integer[np.ndarray, "*rest place row"]:
        """Return the first `width` words of texts, and whatever is behind a shorter one."""
        places = self.places(which, width)
        return self.short.take(places, mode="clip") if len(self.words) else np.zeros(places.shape, np.uint16)


@dataclass(frozen=True)
class Groups:
    """The references of each image.

    Attributes:
        texts: Those of the first image, then of the second, and so on.
        starts: Which of `texts` is each image's first, and their number.
    """

    texts: Texts
    starts: Int[np.ndarray, "image_and_end"]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Sequence[int]]]) -> "Groups":
        """Return references given as rows of numbers.

        Raises:
            ValueError: An image has none.
        """
        return cls(Texts.of([*chain.from_iterable(groups)]), _offsets(groups))


@dataclass(frozen=True)
class Block:
    """Candidates beside as many references each; text 0 is the candidate itself.

    Attributes:
        rows: Which candidates.
        texts: Which references.
        lengths: Words of each text.
        masks: For each text and place of the candidate, at which places of the text the word there stands.
            Beyond the candidate's end they say nothing.
    """

    rows: Int[np.ndarray, "row"]
    texts: Int[np.ndarray, "reference row"]
    lengths: Int[np.ndarray, "text row"]
    masks: Shaped[np.ndarray, "text place row"]

    def n_grams(
        self,
    ) -> tuple[Integer[np.ndarray, "n text place row"], Bool[np.ndarray, "n place row"]]:
        """Return how often the candidate's n-gram of each place is in each text, for n of 1 to 4.

        Beside it, whether an n-gram begins there, and for the first time in the candidate; where not, the
        former says nothing.
        """
        width = self.masks.shape[1]
        found = np.zeros((MAX_ORDER, *self.masks.shape), self.masks.dtype)
        found[0] = self.masks
        for n in range(1, min(MAX_ORDER, width)):
            np.bitwise_and(found[n - 1, :, :-n], self.masks[:, n:] >> n, out=found[n, :, :-n])
        # Mostly a text has it once or never, and counting bits is slow. Of what is there once, no longer
        # n-gram is there more often.
        counts = (found != 0).astype(np.int64) if found.dtype == object else (found != 0).view(np.uint8)
        several = np.flatnonzero(self.masks & (self.masks - self.masks.dtype.type(1)) != 0)
        flat = (MAX_ORDER, -1)
        counts.reshape(flat)[:, several] = np.bitwise_count(found.reshape(flat)[:, several])
        before = low_bit_masks(np.arange(width), found.dtype)[:, None]
        inside = np.arange(width)[:, None] + np.arange(MAX_ORDER)[:, None, None] < self.lengths[0]
        return counts, inside & (found[:, 0] & before == 0)


def low_bit_masks(bits: Int[np.ndarray, "*any"], dtype: np.dtype) -> Shaped[np.ndarray, "*any"]:
    """Return masks of the lowest bits."""
    masks = (1 << np.arange(bits.max(initial=0) + 1, dtype=object)) - 1
    return masks.astype(dtype).take(bits)


def blocks(
    candidates: Texts, references: Groups, images: Int[np.ndarray, "candidate"] | None = None
) -> Iterator[Block]:
    """Yield all candidates, those of like size together.

    Args:
        candidates: Texts.
        references: What they stand beside.
        images: Whose references each candidate stands beside; None: of none.
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
    for alike in np.split(order, np.flatnonzero(changes) + 1):
        if not len(alike):
            return
        others, longest_here = int(counts[alike[0]]), int(longest[alike[-1]])
        rows_at_once = max(1, _CELLS // ((1 + others) * max(1, longest_here)))
        for start in range(0, len(alike), rows_at_once):
            rows = alike[start : start + rows_at_once]
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
    width, own_width = (int(each.max(initial=0)) for each in (lengths, lengths[0]))
    words = np.concatenate([candidates.rows(rows, width)[None], references.rows(texts, width)])
    # Only where candidates and references both have 16 bits is there no word of this number.
    nowhere = _NOWHERE if words.dtype == np.uint16 else -1
    own = np.where(
        np.arange(own_width)[:, None] < lengths[0], words[0, :own_width], words.dtype.type(nowhere)
    )
    masks = np.zeros((len(words), *own.shape), dtype)
    equal, byte = np.empty(masks.shape, bool), np.empty(masks.shape, np.uint8)
    # Eight places at a time, from the last on: bytes are faster than what they are part of.
    for start in reversed(range(0, width, 8)):
        byte.fill(0)
        for place in reversed(range(start, min(start + 8, width))):
            np.equal(words[:, place, None], own, out=equal)
            np.add(byte, byte, out=byte)
            np.bitwise_or(byte, equal.view(np.uint8), out=byte)
        masks = byte.astype(dtype) | (masks << 8 if start + 8 < width else 0)
    masks &= low_bit_masks(lengths, masks.dtype)[:, None]
    return Block(rows, texts, lengths, masks)


@dataclass(frozen=True)
class EncodedCorpus:
    """Candidates beside the references of their images."""

    candidates: Texts
    references: Groups

    @cached_property
    def blocks(self) -> list[Block]:
        """All of it."""
        images = np.arange(len(self.candidates.lengths))
        return list(blocks(self.candidates, self.references, images))


def encode_corpus(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, by_spaces: bool = False
) -> EncodedCorpus:
    """Return texts as numbers; the last ones are kept, for the metric that asks next.

    Args:
        candidates: One for each image.
        references: Of each image, one or more.
        by_spaces: Each single space parts two words, which may be empty; else any white space does.

    Raises:
        ValueError: More images in one than in the other, or one without a reference.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} images, wanted one for each")
    spaced, whole = _numbered(tuple(candidates), tuple(map(tuple, references)))
    return spaced if by_spaces else whole


@lru_cache(maxsize=1)
def _numbered(
    candidates: tuple[str, ...], references: tuple[tuple[str, ...], ...]
) -> tuple[EncodedCorpus, EncodedCorpus]:
    """Return texts as parted by single spaces, and by white space."""
    texts = [*candidates, *chain.from_iterable(references)]
    words = " ".join(texts).split(" ") if texts else []
    numbers: defaultdict[str, int] = defaultdict(count().__next__)
    by_spaces = Texts(
        np.fromiter(map(numbers.__getitem__, words), np.int32, len(words)),
        np.cumsum([0, *(text.count(" ") + 1 for text in texts)]),
    )
    spaced = _parted(by_spaces, references)
    distinct = list(numbers)
    if " ".join(distinct).split() == distinct:
        return spaced, spaced
    # Some words are none for white space, or several.
    parts = Texts.of([[numbers[part] for part in word.split()] for word in distinct])
    sizes = parts.lengths[by_spaces.words]
    ends = np.append(0, np.cumsum(sizes))
    by_white_space = Texts(parts.words[_runs(parts.starts[by_spaces.words], sizes)], ends[by_spaces.starts])
    return spaced, _parted(by_white_space, references)


def _parted(texts: Texts, references: tuple[tuple[str, ...], ...]) -> EncodedCorpus:
    images = len(references)
    own = int(texts.starts[images])
    return EncodedCorpus(
        Texts(texts.words[:own], texts.starts[: images + 1]),
        Groups(Texts(texts.words[own:], texts.starts[images:] - own), _offsets(references)),
    )


def _offsets(groups: Sequence[Sequence[object]]) -> Int[np.ndarray, "image_and_end"]:
    """Return where each image's references begin in a list of all.

    Raises:
        ValueError: An image has none.
    """
    sizes = [*map(len, groups)]
    if 0 in sizes:
        raise ValueError(f"image {sizes.index(0)} in order has no reference, wanted one or more")
    return np.cumsum([0, *sizes])


def _runs(starts: Int[np.ndarray, "run"], sizes: Int[np.ndarray, "run"]) -> Int[np.ndarray, "number"]:
    """Return start, start + 1, ... of all runs, end to end."""
    runs: Int[np.ndarray, "number"] = np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
    runs += np.arange(len(runs))
    return runs
