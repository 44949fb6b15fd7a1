"""Tiny decoders with peaked distributions, and every search over them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captionscale.config_model import DecoderConfig
from captionscale.model.decoders.decoder import decoder_class
from captionscale.model.search.constraints import Constraints
from captionscale.model.search.generate import search
from captionscale.model.search.sampling import sample
from captionscale.vocab import END, PAD, SPECIAL_TOKENS, START, UNK

FEATURE, REGIONS, IMAGES = 6, 4, 5
FIRST_WORD = len(SPECIAL_TOKENS)
"""The first word's token."""


def build_decoder(name: str, feature_size: int, vocab_size: int, **options: Any) -> Any:
    """Return a decoder with options of its own; small sizes by default."""
    kind = DecoderConfig.of({"name": name})
    small = {"embed_size": 5, "hidden_size": 7, "attention_size": 8}
    sizes = {key: value for key, value in small.items() if key in kind.model_fields}
    config = kind.model_validate({"name": name} | sizes | options)
    return decoder_class(name)(config, feature_size, vocab_size)


def peaked_decoder(name: str, seed: int, words: int = 3) -> tuple[Any, Tensor]:
    """Return a decoder of this many words, and features of images."""
    torch.manual_seed(seed)
    layers = {"num_layers": 1} if name in ("plain", "attention") else {}
    decoder = build_decoder(name, FEATURE, FIRST_WORD + words, **layers).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder, torch.randn(IMAGES, REGIONS, FEATURE)


def mask_special_tokens(decoder: Any) -> Any:
    """Return the decoder, which gives special tokens no probability."""
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
