"""The probability and attention of each word of a caption, and attention drawn over the image."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image

from captionscale.model.captioner import Captioner
from captionscale.model.search.constraints import Features
from captionscale.model.search.ensemble import Ensemble
from captionscale.model.search.token_scores import score_captions
from captionscale.vocab import END, Vocabulary

View = UInt8[np.ndarray, "size size 3"]
AttentionMap = Float32[np.ndarray, "row column"]

_COLORMAP = "cividis"
_MIN_OPACITY, _MAX_OPACITY = 0.45, 0.75
_BRIGHTNESS = 0.85


@dataclass(frozen=True, eq=False)
class CaptionResult:
    """A caption with the probability and the attention map of each word."""

    words: list[str]
    probabilities: list[float]
    """Of each word, given the image and the words before it."""
    attention_maps: list[AttentionMap] | None
    """Attention weight of each grid cell for each word; None: the decoder has no attention."""
    log_prob: float
    """Log-probability of the whole caption with its end, in nats."""

    @property
    def caption(self) -> str:
        """The words, separated by spaces."""
        return " ".join(self.words)

    @property
    def max_attention(self) -> float:
        """Maximum over cells and words, which scales all overlays of one caption."""
        return max((float(each.max()) for each in self.attention_maps or ()), default=0.0)


@torch.no_grad()
def encode_views(captioner: Captioner | Ensemble, views: Sequence[View]) -> Features:
    """Return the features of views, on the captioner's device."""
    device = next(captioner.parameters()).device
    return captioner.encode(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(device))


def build_caption_results(
    captioner: Captioner | Ensemble,
    features: Features,
    captions: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    image_size: int,
) -> list[CaptionResult]:
    """Return probabilities and attention of captions, whichever way these were generated.

    Args:
        captioner: In evaluation mode.
        features: Of each caption's image; an image may occur twice.
        captions: Tokens as searches return them.
        vocabulary: The captioner's.
        image_size: Side of the views, in pixels.
    """
    results = []
    all_scores = score_captions(captioner.decoder, features, captions)
    for tokens, scores in zip(captions, all_scores, strict=True):
        words = [token for token in tokens if token != END]
        attention_maps = None
        if scores.attention is not None and isinstance(captioner, Captioner):
            attention = scores.attention[: len(words)].cpu()
            attention_maps = list(captioner.encoder.attention_maps(attention, image_size, image_size).numpy())
        results.append(
            CaptionResult(
                [vocabulary.words[word] for word in words],
                scores.log_probs[: len(words)].exp().tolist(),
                attention_maps,
                float(scores.log_probs.sum()),
            )
        )
    return results


def overlay(image: Image.Image, weights: AttentionMap, max_weight: float) -> Image.Image:
    """Draw a map over an image: the more attention, the lighter and the more opaque the color.

    Args:
        image: Of any size; the map is stretched over it, bilinearly between the centers of its cells.
        weights: Of each cell.
        max_weight: Weight of the full color; one for all words of a caption makes overlays comparable.

    Source:
        cividis: Nuñez, Anderton and Renslow 2018, "Optimizing colormaps with consideration for color vision
        deficiency" (arXiv:1712.01662). It looks the same with and without color-vision deficiency, steps of
        weight look equal, and the order survives printing in gray.
    """
    scaled = Image.fromarray(weights / max(max_weight, np.finfo(np.float32).tiny))
    heat = np.asarray(scaled.resize(image.size, Image.Resampling.BILINEAR)).clip(0, 1)
    colors = _palette()[(255 * heat).round().astype(np.uint8)]
    # The image's own colors would be read as those of the map.
    gray = _BRIGHTNESS * np.asarray(image.convert("L"), np.float32)[:, :, None] / 255
    opacity = (_MIN_OPACITY + (_MAX_OPACITY - _MIN_OPACITY) * heat)[:, :, None]
    return Image.fromarray((255 * (opacity * colors + (1 - opacity) * gray)).round().astype(np.uint8))


def base64_jpeg(image: Image.Image, **options: Any) -> str:
    """Return an image as base64 JPEG for a page; the options are those of `Image.save`."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return base64.b64encode(file.getvalue()).decode()


@cache
def _palette() -> Float32[np.ndarray, "256 3"]:
    from matplotlib import colormaps

    return colormaps[_COLORMAP](np.arange(256))[:, :3].astype(np.float32)
