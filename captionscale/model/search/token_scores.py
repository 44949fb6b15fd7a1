"""Read captions again that a search has found: how likely was each word, and where did the decoder look?"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from captionscale.model.decoders.registry import Decoder
from captionscale.model.search.constraints import Features, read_prefix
from captionscale.vocab import PAD


class TokenScores(NamedTuple):
    """What a decoder made of the words of one caption."""

    log_probs: Float[Tensor, "time"]
    """Natural logarithm of each token's probability, given the image and the tokens before it."""
    attention: Float[Tensor, "time region"] | None
    """Where it looked to say each token; of one without attention none."""


@torch.no_grad()
def score_captions(
    decoder: Decoder, features: Features, captions: Sequence[Sequence[int]]
) -> list[TokenScores]:
    """Return what a decoder makes of captions, whichever way they were found.

    It reads them word by word by its own `step`, as the search did. The probabilities are those among all
    words: constraints that a search was given, its temperature and the like change what is said, not these.

    Args:
        decoder: In evaluation mode.
        features: Of each caption's image.
        captions: Tokens without the start and without padding; with the end token where it was said.
    """
    begun = read_prefix(decoder, features, ())
    tokens, state = begun.tokens, begun.state
    longest = max(map(len, captions), default=0)
    rows = [[*caption, *[PAD] * (longest - len(caption))] for caption in captions]
    said = torch.tensor(rows, dtype=torch.long, device=tokens.device).view(len(captions), longest)
    gains, attentions = torch.zeros(len(captions), longest, device=tokens.device), []
    for time, words in enumerate(said.unbind(1)):
        logits, state, attention = decoder.step(tokens, state)
        gains[:, time] = logits.float().log_softmax(1).gather(1, words.unsqueeze(1)).squeeze(1)
        attentions += [] if attention is None else [attention.float()]
        tokens = words
    return [
        TokenScores(
            gains[row, : len(caption)],
            torch.stack([look[row] for look in attentions[: len(caption)]])
            if attentions and caption
            else None,
        )
        for row, caption in enumerate(captions)
    ]
