"""BLEU-1 to BLEU-4, as pycocoevalcap has them.

Source:
    Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation", with the closest
    reference length; what is added to counts, so that nothing is divided by 0, is pycocoevalcap's.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

from captionscale.score.ngrams import MAX_ORDER, encode_corpus

_TINY, _SMALL = 1e-15, 1e-9


def statistics(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> Float64[np.ndarray, "image 10"]:
    """Return what BLEU counts; the sums over images are those of the corpus.

    Args:
        candidates: Tokenized, one for each image.
        references: Tokenized, of each image one or more.

    Returns:
        The candidate's n-grams, for n of 1 to 4; how many of them are in a reference, each no oftener than in
        the reference that has most of it; words; words of the reference that is closest in length, the
        shorter one of two.

    Raises:
        ValueError: More images in one than in the other, or one without a reference.
    """
    found = np.zeros((len(candidates), 2 * MAX_ORDER + 2))
    for block in encode_corpus(candidates, references).blocks:
        own, others = block.lengths[0], block.lengths[1:]
        counts, first = block.n_grams()
        clipped = np.minimum(counts[:, 0], counts[:, 1:].max(axis=1)) * first
        found[block.rows, :MAX_ORDER] = np.maximum(0, own[:, None] - np.arange(MAX_ORDER))
        found[block.rows, MAX_ORDER:-2] = clipped.sum(axis=1, dtype=np.int64).T
        found[block.rows, -2] = own
        # By distance, then by length, as one number.
        unit = others.max() + 1
        found[block.rows, -1] = (abs(others - own) * unit + others).min(axis=0) % unit
    return found


def corpus_score(sums: Float[np.ndarray, "*any 10"]) -> Float64[np.ndarray, "*any 4"]:
    """Return BLEU-1 to BLEU-4, 0 to 1, of the sums of what `statistics` gives, for any images.

    A row alone is an image as if it were a corpus; an empty candidate has 0.
    """
    guesses, correct, length, closest = np.split(sums, [MAX_ORDER, 2 * MAX_ORDER, 2 * MAX_ORDER + 1], axis=-1)
    figures = np.cumprod((correct + _TINY) / (guesses + _SMALL), axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (length + _TINY) / (closest + _SMALL)
    return np.where(ratio < 1, figures * np.exp(1 - 1 / ratio), figures)
