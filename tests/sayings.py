"""Tiny decoders with strong opinions, and every way to have captions of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captionscale.config import Decoder
from captionscale.model.decoders.registry import DECODERS
from captionscale.model.search.constraints import Constraints
from captionscale.model.search.generate import search
from captionscale.model.search.sampling import sample
from captionscale.vocab import END, PAD, SPECIAL_TOKENS, START, UNK

FEATURE, REGIONS, IMAGES = 6, 4, 5
FIRST_WORD = len(SPECIAL_TOKENS)
"""The first word's token."""


def peaked_decoder(name: str, seed: int, words: int = 3) -> tuple[Any, Tensor]:
    """Return a decoder of so many words, and features of images."""
    torch.manual_seed(seed)
    layers = {} if name == "top_down" else {"num_layers": 1}
    settings = Decoder(name=name, embed_size=5, hidden_size=7, attention_size=8, **layers)
    decoder = DECODERS[name](settings, FEATURE, FIRST_WORD + words).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder, torch.randn(IMAGES, REGIONS, FEATURE)


def mask_special_tokens(decoder: Any) -> Any:
    """Return the decoder, which gives tokens that nothing says no probability."""
    with torch.no_grad():
        decoder.output_projection.bias[[PAD, START, UNK]] = -1e9
    return decoder


def _searched(**settings: Any) -> Callable[..., list[list[list[int]]]]:
    def write(decoder: Any, features: Any, constraints: Constraints, max_words: int) -> list[list[list[int]]]:
        found = search(
            decoder,
            features,
            max_words=max_words,
            constraints=constraints,
            **{"length_penalty": 0.7} | settings,
        )
        return [[caption.tokens for caption in captions] for captions in found]

    return write


def _sampled(**settings: Any) -> Callable[..., list[list[list[int]]]]:
    def write(decoder: Any, features: Any, constraints: Constraints, max_words: int) -> list[list[list[int]]]:
        tokens, _ = sample(
            decoder, features, samples_per_image=20, max_words=max_words, constraints=constraints, **settings
        )
        rows = [[token for token in row if token != PAD] for row in tokens.tolist()]
        return [rows[start : start + 20] for start in range(0, len(rows), 20)]

    return write


SEARCHES = {
    "greedy": _searched(beam=1),
    "beam": _searched(beam=4),
    "diverse": _searched(beam=6, groups=3, diversity_penalty=1.0),
}
STRATEGIES = SEARCHES | {
    "sampled": _sampled(),
    "sampled-hot-few": _sampled(temperature=3.0, top_k=5, top_p=0.9),
}
"""Each gives all captions that it has for each image: tokens without padding."""


def strip_end(tokens: list[int]) -> list[int]:
    """Return a caption without its end token."""
    assert END not in tokens[:-1]
    return [token for token in tokens if token != END]
