"""ROUGE-L, as pycocoevalcap has it.

Source:
    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", with beta 1.2 and with the best
    precision and the best recall of all references, be they of two.  The longest common subsequence is found
    by the bits of integers: Hyyro 2004, "Bit-Parallel LCS-length Computation Revisited".
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from captionscale.score.ngrams import Block, encode_corpus, low_bit_masks

_BETA = 1.2


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "image"]:
    """Return ROUGE-L of each image, 0 to 1; the corpus figure is their mean.

    An empty text is one empty word, as for pycocoevalcap: an empty candidate has 0, and 1 if a reference is
    empty too.

    Args:
        candidates: Tokenized, one for each image.
        references: Tokenized, of each image one or more.

    Raises:
        ValueError: More images in one than in the other, or one without a reference.
    """
    figures = np.zeros(len(candidates))
    for block in encode_corpus(candidates, references, by_spaces=True).blocks:
        common = _common(block)
        precision = (common / block.lengths[0]).max(axis=0)
        recall = (common / block.lengths[1:]).max(axis=0)
        figures[block.rows] = np.divide(
            (1 + _BETA**2) * precision * recall,
            recall + _BETA**2 * precision,
            out=np.zeros_like(recall),
            where=common.any(axis=0),
        )
    return figures


def _common(block: Block) -> Int[np.ndarray, "reference row"]:
    """Return the length of the longest common subsequence of each candidate and each of its references."""
    masks, lengths = block.masks[1:], block.lengths[1:]
    inside = low_bit_masks(lengths, masks.dtype)
    # A bit that is 0 at the end is a place where the subsequence has grown.
    row = inside.copy()
    for place in range(masks.shape[1]):
        hits = row & masks[:, place]
        row = (row + hits) | (row - hits)
    grown: Int[np.ndarray, "reference row"] = lengths - np.bitwise_count(row & inside).astype(np.int64)
    return grown
