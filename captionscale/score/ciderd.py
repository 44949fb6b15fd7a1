"""CIDEr-D of captions, and as the reward of self-critical training.

Source:
    Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation" (arXiv:1411.5726), the variant
    D with sigma 6, as pycocoevalcap has it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int, Integer, UInt64

from captionscale.score.ngrams import MAX_ORDER, Block, Groups, Texts, blocks, encode_corpus

_SIGMA = 6.0

# Odd, so that no two products are equal; their high bits are spread evenly (Knuth's multiplicative hashing).
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "image"]:
    """Return CIDEr-D of each image, 0 to 10, with the document frequencies of these references.

    That is the leaderboard's way; the corpus figure is the mean.  A lone image has 0, since no n-gram is
    rarer than another, and so has each image where no reference has a word.

    Args:
        candidates: Tokenized, one for each image.
        references: Tokenized, of each image one or more.

    Raises:
        ValueError: More images in one than in the other, or one without a reference.
    """
    pairs = encode_corpus(candidates, references)
    return _Scorer(pairs.references).score(pairs.candidates, pairs.blocks)


class CiderDReward:
    """CIDEr-D of sampled captions, against references of which all is known beforehand.

    Captions and references are the captioner's tokens, the end token with them: without it in both, training
    learns captions that stop at "with a" (arXiv:2305.12254).  Memory does not grow with what is scored.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[int]]]):
        """Count n-grams, with the document frequencies of these references.

        Args:
            references: Of each train image one or more, each from its first word to its end token.

        Raises:
            ValueError: An image has no reference, or references end with different tokens.
        """
        groups = Groups.of(references)
        texts = groups.texts
        ends = texts.words[texts.starts[1:] - 1] if texts.lengths.all() else np.arange(2)
        if (ends != ends[:1]).any():
            raise ValueError("references end with different tokens, wanted each with the end token")
        self._scorer = _Scorer(groups)

    def __call__(
        self, images: Sequence[int] | Int[np.ndarray, "caption"], captions: Sequence[Sequence[int]]
    ) -> Float64[np.ndarray, "caption"]:
        """Return the reward of each caption, 0 to 10.

        Args:
            images: Which image each caption is of: its place in the references.
            captions: Tokens, from the first word to the end token, if it was reached.

        Raises:
            ValueError: More images than captions, or fewer.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(captions)} captions of {len(images)} images, wanted an image for each")
        texts = Texts.of(captions)
        return self._scorer.score(texts, blocks(texts, self._scorer.references, np.asarray(images, np.int64)))


class _Scorer:
    """References with their document frequencies and the lengths of their vectors."""

    def __init__(self, references: Groups):
        self.references = references
        self.idf, squares = _Idf.of(references)
        self.norms = np.empty((MAX_ORDER, len(references.texts.lengths)))
        for block in blocks(references.texts, references):
            places = references.texts.places(block.rows, block.masks.shape[1])
            counts, first = block.n_grams()
            weights = squares.take(places, axis=1, mode="clip") * first
            self.norms[:, block.rows] = _norms(weights, counts[:, 0], block)

    def score(self, captions: Texts, near: Iterable[Block]) -> Float64[np.ndarray, "caption"]:
        squares = self.idf.squared(captions)
        scores = np.zeros(len(captions.lengths))
        for block in near:
            places = captions.places(block.rows, block.masks.shape[1])
            counts, first = block.n_grams()
            weights = squares.take(places, axis=1, mode="clip") * first
            shared = np.minimum(counts[:, :1], counts[:, 1:])
            products = np.multiply(shared, counts[:, 1:], dtype=_holding(counts, block))
            cosines = np.einsum("nrpc,npc->nrc", products, weights)
            norms = _norms(weights, counts[:, 0], block)[:, None] * self.norms[:, block.texts]
            np.divide(cosines, norms, out=cosines, where=norms != 0)
            away = block.lengths[1:] - block.lengths[0]
            penalties = np.exp(-(away**2) / (2 * _SIGMA**2))
            scores[block.rows] = 10 / MAX_ORDER * (cosines.sum(axis=0) * penalties).mean(axis=0)
        return scores


class _Idf:
    """How rare each n-gram is: log of the number of images by those whose references have it.

    An n-gram that no image has counts as if one had it, so those that one image has need not be kept.  Then
    each n-gram that is kept is one that was kept, and a word more: it is known by the number of the former,
    and four small searches find all four n-grams of a place, in any vocabulary.
    """

    def __init__(self, images: int, words: int):
        self.images = images
        self.words = words
        self.levels: list[_Level] = []

    @classmethod
    def of(cls, references: Groups) -> tuple["_Idf", Float64[np.ndarray, "n word"]]:
        """Count n-grams; beside it, what `squared` would say of the same texts."""
        texts, images = references.texts, len(references.starts) - 1
        # One number more than there are, for words that no reference has.
        idf = cls(images, int(texts.words.max(initial=-1)) + 2)
        image_of = np.repeat(np.arange(images, dtype=np.uint64), np.diff(texts.starts[references.starts]))
        return idf, idf._walk(texts, image_of)

    def squared(self, texts: Texts) -> Float64[np.ndarray, "n word"]:
        """Return the squared idf of the n-grams that begin at each word."""
        return self._walk(texts, None)

    def _walk(
        self, texts: Texts, image_of: UInt64[np.ndarray, "word"] | None
    ) -> Float64[np.ndarray, "n word"]:
        most = np.log(max(1, self.images)) ** 2
        squares = np.full((MAX_ORDER, len(texts.words)), most)
        words = np.minimum(texts.words, self.words - 1).astype(np.uint64)
        at, keys = np.arange(len(words)), words
        for n in range(MAX_ORDER):
            if image_of is not None:
                self.levels.append(_Level(keys, image_of[at], self.images))
            level = self.levels[n]
            known, found = level.find(keys)
            squares[n, at] = np.where(found, level.squares[known], most)
            longer = np.flatnonzero(found & (texts.left[at] > n + 1))
            at = at[longer]
            keys = known[longer].astype(np.uint64) * np.uint64(self.words) + words[at + n + 1]
        return squares


class _Level:
    """The n-grams of one order that two images have, or more."""

    def __init__(self, keys: UInt64[np.ndarray, "start"], image_of: UInt64[np.ndarray, "start"], images: int):
        bits = np.uint64(images.bit_length())
        pairs = (keys << bits) | image_of
        pairs.sort()
        seen = pairs[_firsts(pairs)] >> bits
        firsts = _firsts(seen)
        counts = np.diff(np.append(firsts, len(seen)))
        kept = np.flatnonzero(counts > 1)
        spread = seen[firsts[kept]] * _SPREAD
        order = np.argsort(spread)
        counts = counts[kept[order]]
        idf = np.where(counts == images, 0.0, np.log(max(1, images)) - np.log(counts))
        self.squares = np.append(idf**2, np.nan)
        self.spread = np.append(spread[order], np.uint64(2**64 - 1))
        # Where each bucket of equal high bits begins; one holds half an n-gram in the mean.
        self.shift = np.uint64(63 - len(order).bit_length())
        sizes = np.bincount(
            (self.spread[:-1] >> self.shift).view(np.int64), minlength=2 << len(order).bit_length()
        )
        self.begins = np.cumsum(sizes) - sizes

    def find(
        self, keys: UInt64[np.ndarray, "start"]
    ) -> tuple[Int[np.ndarray, "start"], Bool[np.ndarray, "start"]]:
        """Return the number of each n-gram, and whether it has one."""
        wanted = keys * _SPREAD
        at = self.begins[(wanted >> self.shift).view(np.int64)]
        behind = np.flatnonzero(self.spread[at] < wanted)
        while len(behind):
            at[behind] += 1
            behind = behind[self.spread[at[behind]] < wanted[behind]]
        return at, (self.spread[at] == wanted) & (at < len(self.squares) - 1)


def _firsts(ordered: UInt64[np.ndarray, "any"]) -> Int[np.ndarray, "first"]:
    """Return where equal numbers begin."""
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return np.flatnonzero(new)


def _norms(
    weights: Float64[np.ndarray, "n place row"], counts: Integer[np.ndarray, "n place row"], block: Block
) -> Float64[np.ndarray, "n row"]:
    """Return the lengths of vectors."""
    squares = np.square(counts, dtype=_holding(counts, block))
    norms: Float64[np.ndarray, "n row"] = np.sqrt(np.einsum("npc,npc->nc", weights, squares))
    return norms


def _holding(counts: Integer[np.ndarray, "*any"], block: Block) -> np.dtype:
    """Return what holds the product of two counts of a block."""
    few = block.masks.shape[1] * block.lengths.max(initial=0) <= np.iinfo(np.uint8).max
    return counts.dtype if few else np.promote_types(counts.dtype, np.uint16)
