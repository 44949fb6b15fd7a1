"""BLEU-1 to BLEU-4, equal to pycocoevalcap's.

Source:
    Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation", with the closest
    reference length. The constants that keep divisors from 0 are pycocoevalcap's.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

from captionscale.score.metric import Metric
from captionscale.score.ngrams import MAX_ORDER, encode_corpus

_TINY, _SMALL = 1e-15, 1e-9


def statistics(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> Float64[np.ndarray, "image 10"]:
    """Return BLEU's counts for each image; their sums are those of the corpus.

    Args:
        candidates: Tokenized, one for each image.
        references: Tokenized, one or more for each image.

    Returns:
        The candidate's n-grams, for n from 1 to 4; those found in a reference, each counted at most as often
        as in the reference with most of it; the candidate's words; the words of the reference closest in
        length (the shorter of two).

    Raises:
        ValueError: Different numbers of images, or an image without a reference.
    """
    rows = np.zeros((len(candidates), 2 * MAX_ORDER + 2))
    for block in encode_corpus(candidates, references).blocks:
        own, others = block.lengths[0], block.lengths[1:]
        counts, first = block.n_grams()
        clipped = np.minimum(counts[:, 0], counts[:, 1:].max(axis=1)) * first
        rows[block.rows, :MAX_ORDER] = np.maximum(0, own[:, None] - np.arange(MAX_ORDER))
        rows[block.rows, MAX_ORDER:-2] = clipped.sum(axis=1, dtype=np.int64).T
        rows[block.rows, -2] = own
        # Distance and length as one number: the nearest reference, then the shorter one.
        unit = others.max() + 1
        rows[block.rows, -1] = (abs(others - own) * unit + others).min(axis=0) % unit
    return rows


def corpus_score(sums: Float[np.ndarray, "*sets 10"]) -> Float64[np.ndarray, "*sets 4"]:
    """Return BLEU-1 to BLEU-4, 0 to 1, of summed `statistics`; an empty candidate scores 0."""
    guesses, correct, length, closest = np.split(sums, [MAX_ORDER, 2 * MAX_ORDER, 2 * MAX_ORDER + 1], axis=-1)
    scores = np.cumprod((correct + _TINY) / (guesses + _SMALL), axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (length + _TINY) / (closest + _SMALL)
    return np.where(ratio < 1, scores * np.exp(1 - 1 / ratio), scores)


class Bleu(Metric):
    """BLEU with n-grams of up to `order` words."""

    family = "BLEU"
    signature = "bleu coco"
    width = 2 * MAX_ORDER + 2
    statistics = staticmethod(statistics)

    def __init__(self, order: int):
        """Take n from 1 to 4."""
        self.name, self._order = f"BLEU-{order}", order

    def corpus_score(self, sums: Float[np.ndarray, "*sets 10"]) -> Float64[np.ndarray, "*sets"]:
        """Return BLEU of this order."""
        return np.asarray(corpus_score(sums)[..., self._order - 1])
