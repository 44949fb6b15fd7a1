"""Where a model looked for each word of a caption, and how sure it was: as numbers, and over the picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image

from captionscale.model.captioner import Captioner
from captionscale.model.decoders.registry import Decoder
from captionscale.model.search.constraints import Features
from captionscale.model.search.ensemble import Ensemble
from captionscale.model.search.token_scores import score_captions
from captionscale.vocab import END, Vocabulary

View = UInt8[np.ndarray, "size size 3"]
AttentionMap = Float32[np.ndarray, "row column"]

_COLOURS = "cividis"
_INK = 0.75
_FAINTEST = 0.45
_DIM = 0.85


@dataclass(frozen=True, eq=False)
class CaptionResult:
    """A caption, how sure the model was of each of its words, and where it looked for it."""

    words: list[str]
    probabilities: list[float]
    """Of each word among all words, given the picture and the words before it."""
    attention_maps: list[AttentionMap] | None
    """For each word, the share of the attention that each cell of the grid had: rows from the top, columns
    from the left. None: the decoder has no attention."""
    log_prob: float
    """Natural logarithm of the whole caption's probability, with its end."""

    @property
    def caption(self) -> str:
        """The words, with spaces between them."""
        return " ".join(self.words)

    @property
    def max_attention(self) -> float:
        """The greatest share that a cell had for any word: what pictures of one caption are scaled by."""
        return max((float(each.max()) for each in self.attention_maps or ()), default=0.0)


@torch.no_grad()
def encode_views(captioner: Captioner | Ensemble, views: Sequence[View]) -> Features:
    """Return what a captioner's decoder starts from, on the captioner's device."""
    device = next(captioner.parameters()).device
    return captioner.encode(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(device))


def build_caption_results(
    decoder: Decoder, features: Features, captions: Sequence[Sequence[int]], vocabulary: Vocabulary
) -> list[CaptionResult]:
    """Return where a decoder looked for the words of captions, whichever way these were found.

    Args:
        decoder: In evaluation mode.
        features: Of each caption's picture; a picture may come twice.
        captions: Tokens as searches return them.
        vocabulary: The decoder's.
    """
    gazes = []
    for tokens, trace in zip(captions, score_captions(decoder, features, captions), strict=True):
        words = [token for token in tokens if token != END]
        attention_maps = None
        if trace.attention is not None:
            # Pictures are square, so grids are.
            side = math.isqrt(trace.attention.shape[1])
            attention_maps = list(trace.attention[: len(words)].view(-1, side, side).cpu().numpy())
        gazes.append(
            CaptionResult(
                [vocabulary.words[word] for word in words],
                trace.log_probs[: len(words)].exp().tolist(),
                attention_maps,
                float(trace.log_probs.sum()),
            )
        )
    return gazes


def overlay(picture: Image.Image, weights: AttentionMap, max_weight: float) -> Image.Image:
    """Lay a map over a picture: the more attention, the more of the colour, and the lighter it is.

    Args:
        picture: Of any size; the map is stretched over it, bilinearly between the centres of its cells.
        weights: Of each cell.
        max_weight: Weight that has the full colour. One for all words of a caption makes their pictures comparable.

    Source:
        cividis: Nuñez, Anderton and Renslow 2018, "Optimizing colormaps with consideration for color vision
        deficiency" (arXiv:1712.01662). From dark to light it looks the same with and without colour-vision
        deficiency, equal steps of weight are equal steps to the eye, and in grey print the order stays.
    """
    smooth = Image.fromarray(weights / max(max_weight, np.finfo(np.float32).tiny))
    heat = np.asarray(smooth.resize(picture.size, Image.Resampling.BILINEAR)).clip(0, 1)
    colours = _palette()[(255 * heat).round().astype(np.uint8)]
    # The photograph's own colours would be read as the map's.
    grey = _DIM * np.asarray(picture.convert("L"), np.float32)[:, :, None] / 255
    ink = (_FAINTEST + (_INK - _FAINTEST) * heat)[:, :, None]
    return Image.fromarray((255 * (ink * colours + (1 - ink) * grey)).round().astype(np.uint8))


@cache
def _palette() -> Float32[np.ndarray, "256 3"]:
    from matplotlib import colormaps

    return colormaps[_COLOURS](np.arange(256))[:, :3].astype(np.float32)
