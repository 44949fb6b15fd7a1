"""ROUGE-L, equal to pycocoevalcap's.

Source:
    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", with beta 1.2, and with the best
    precision and the best recall of all references, even of two different ones. The longest common
    subsequence is computed on bits: Hyyro 2004, "Bit-Parallel LCS-length Computation Revisited".
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from captionscale.score.metric import MeanMetric
from captionscale.score.ngrams import Block, encode_corpus, low_bit_masks

_BETA = 1.2


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Float64[np.ndarray, "image"]:
    """Return ROUGE-L of each image, 0 to 1.

    As in pycocoevalcap, an empty text is one empty word: an empty candidate scores 0, or 1 if a reference is
    empty too.

    Args:
        candidates: Tokenized, one for each image.
        references: Tokenized, one or more for each image.

    Raises:
        ValueError: Different numbers of images, or an image without a reference.
    """
    scores = np.zeros(len(candidates))
    for block in encode_corpus(candidates, references, by_spaces=True).blocks:
        common = _common(block)
        precision = (common / block.lengths[0]).max(axis=0)
        recall = (common / block.lengths[1:]).max(axis=0)
        scores[block.rows] = np.divide(
            (1 + _BETA**2) * precision * recall,
            recall + _BETA**2 * precision,
            out=np.zeros_like(recall),
            where=common.any(axis=0),
        )
    return scores


def _common(block: Block) -> Int[np.ndarray, "reference row"]:
    """Return the length of the longest common subsequence of each candidate and each of its references."""
    masks, lengths = block.masks[1:], block.lengths[1:]
    inside = low_bit_masks(lengths, masks.dtype)
    # A bit that is 0 at the end is a word at which the subsequence grew.
    row = inside.copy()
    for position in range(masks.shape[1]):
        hits = row & masks[:, position]
        row = (row + hits) | (row - hits)
    grown: Int[np.ndarray, "reference row"] = lengths - np.bitwise_count(row & inside).astype(np.int64)
    return grown


class RougeL(MeanMetric):
    """ROUGE-L; the corpus value is the mean."""

    name = "ROUGE-L"
    signature = "rouge-l coco"
    per_image = staticmethod(rouge_l)
