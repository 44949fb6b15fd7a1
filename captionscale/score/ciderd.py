"""CIDEr-D, equal to pycocoevalcap's, and as the reward of self-critical training.

Source:
    Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation" (arXiv:1411.5726), variant D
    with sigma 6.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int, Integer, UInt64

from captionscale.score.metric import MeanMetric
from captionscale.score.ngrams import MAX_ORDER, Block, Groups, Texts, blocks, encode_corpus

_SIGMA = 6.0


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "image"]:
    """Return CIDEr-D of each image, 0 to 10, with the document frequencies of these references.

    A single image scores 0, because no n-gram is rarer than another; so does an image whose references are
    all empty.

    Args:
        candidates: Tokenized, one for each image.
        references: Tokenized, one or more for each image.

    Raises:
        ValueError: Different numbers of images, or an image without a reference.
    """
    pairs = encode_corpus(candidates, references)
    return _Scorer(pairs.references).score(pairs.candidates, pairs.blocks)


class CiderD(MeanMetric):
    """CIDEr-D; the corpus value is the mean."""

    name = "CIDEr-D"
    range = (0.0, 10.0)
    signature = "cider-d n4 sigma6 df=references ({images} images)"
    per_image = staticmethod(cider_d)


class CiderDReward:
    """CIDEr-D of sampled captions against fixed references.

    Captions and references are token ids and include the end token: without it in both, training learns
    captions that stop at "with a" (arXiv:2305.12254). Memory does not grow with the captions scored.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[int]]]):
        """Count n-grams and document frequencies.

        Args:
            references: One or more for each train image, each from its first token to its end token.

        Raises:
            ValueError: An image has no reference, or references end with different tokens.
        """
        groups = Groups.of(references)
        texts = groups.texts
        ends = texts.words[texts.starts[1:] - 1] if texts.lengths.all() else np.arange(2)
        if (ends != ends[:1]).any():
            raise ValueError("references end with different tokens, expected the end token in each")
        self._scorer = _Scorer(groups)

    def __call__(
        self, images: Sequence[int] | Int[np.ndarray, "caption"], captions: Sequence[Sequence[int]]
    ) -> Float64[np.ndarray, "caption"]:
        """Return the reward of each caption, 0 to 10.

        Args:
            images: The index of each caption's image in the references.
            captions: Token ids, from the first to the end token if it was reached.

        Raises:
            ValueError: Different numbers of images and captions.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(captions)} captions of {len(images)} images, expected an image for each")
        texts = Texts.of(captions)
        return self._scorer.score(texts, blocks(texts, self._scorer.references, np.asarray(images, np.int64)))


class _Scorer:
    """References with their document frequencies and the norms of their vectors."""

    def __init__(self, references: Groups):
        self.references, texts = references, references.texts
        images = len(references.starts) - 1
        image_of = np.repeat(np.arange(images, dtype=np.uint64), np.diff(texts.starts[references.starts]))
        # One more word than there are, for words in no reference.
        self.idf = _Idf(images, int(texts.words.max(initial=-1)) + 2)
        squares = self.idf.squared(texts, image_of)
        self.norms = np.empty((MAX_ORDER, len(texts.lengths)))
        for block in blocks(texts, references):
            counts, weights = _weigh(block, texts, squares)
            self.norms[:, block.rows] = _norms(counts[:, 0], weights)

    def score(self, captions: Texts, comparisons: Iterable[Block]) -> Float64[np.ndarray, "caption"]:
        squares = self.idf.squared(captions)
        scores = np.zeros(len(captions.lengths))
        for block in comparisons:
            counts, weights = _weigh(block, captions, squares)
            shared = np.minimum(counts[:, :1], counts[:, 1:])
            cosines = np.einsum("nrpc,npc->nrc", shared * counts[:, 1:], weights)
            norms = _norms(counts[:, 0], weights)[:, None] * self.norms[:, block.texts]
            np.divide(cosines, norms, out=cosines, where=norms != 0)
            away = block.lengths[1:] - block.lengths[0]
            penalties = np.exp(-(away**2) / (2 * _SIGMA**2))
            scores[block.rows] = 10 / MAX_ORDER * (cosines.sum(axis=0) * penalties).mean(axis=0)
        return scores


class _Idf:
    """Inverse document frequency of n-grams: log(images / images whose references contain the n-gram).

    An n-gram in no image counts as if in one, so n-grams in one image need not be stored. Then the prefix of
    a stored n-gram is stored too: its number and the last word are the key, so four small searches find the
    four n-grams of a position, whatever the vocabulary.
    """

    def __init__(self, images: int, words: int):
        self.images, self.words = images, words
        self.levels: list[_Level] = []

    def squared(
        self, texts: Texts, image_of: UInt64[np.ndarray, "word"] | None = None
    ) -> Float64[np.ndarray, "n word"]:
        """Return the squared IDF of the n-grams that begin at each word; given images, count these first."""
        squares = np.full((MAX_ORDER, len(texts.words)), np.log(max(1, self.images)) ** 2)
        words = np.minimum(texts.words, self.words - 1).astype(np.uint64)
        at, keys = np.arange(len(words)), words
        for n in range(MAX_ORDER):
            if image_of is not None:
                self.levels.append(_Level(keys, image_of[at], self.images))
            number, found = self.levels[n].find(keys)
            at, number = at[found], number[found]
            squares[n, at] = self.levels[n].squares[number]
            longer = texts.left[at] > n + 1
            at, number = at[longer], number[longer]
            keys = number.astype(np.uint64) * np.uint64(self.words) + words[at + n + 1]
        return squares


class _Level:
    """The n-grams of one order that occur in two images or more, by ascending key."""

    def __init__(self, keys: UInt64[np.ndarray, "start"], image_of: UInt64[np.ndarray, "start"], images: int):
        bits = np.uint64(images.bit_length())
        # Each n-gram once for each image.
        keys, counts = np.unique(np.unique((keys << bits) | image_of) >> bits, return_counts=True)
        kept = counts > 1
        counts = counts[kept]
        idf = np.where(counts == images, 0.0, np.log(max(1, images)) - np.log(counts))
        self.squares = idf**2
        # The last key belongs to no n-gram.
        self.keys = np.append(keys[kept], np.uint64(2**64 - 1))

    def find(
        self, keys: UInt64[np.ndarray, "start"]
    ) -> tuple[Int[np.ndarray, "start"], Bool[np.ndarray, "start"]]:
        """Return the number of each n-gram, and whether it is stored."""
        number = np.searchsorted(self.keys, keys)
        return number, self.keys[number] == keys


def _weigh(
    block: Block, texts: Texts, squares: Float64[np.ndarray, "n word"]
) -> tuple[Integer[np.ndarray, "n text position row"], Float64[np.ndarray, "n position row"]]:
    """Return the counts of the candidates' n-grams in a type that holds products, and their squared IDF."""
    counts, first = block.n_grams()
    positions = texts.positions(block.rows, block.masks.shape[1])
    weights = squares.take(positions, axis=1, mode="clip") * first
    return counts.astype(np.promote_types(counts.dtype, np.uint16)), weights


def _norms(
    counts: Integer[np.ndarray, "n position row"], weights: Float64[np.ndarray, "n position row"]
) -> Float64[np.ndarray, "n row"]:
    """Return the norms of TF-IDF vectors."""
    norms: Float64[np.ndarray, "n row"] = np.sqrt(np.einsum("npc,npc->nc", weights, counts**2))
    return norms
