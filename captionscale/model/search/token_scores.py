"""Log-probability and attention of each word of a given caption."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from captionscale.model.decoders.decoder import StepDecoder
from captionscale.model.search.constraints import Features, read_prefix
from captionscale.vocab import PAD


class TokenScores(NamedTuple):
    """Scores of one caption's tokens."""

    log_probs: Float[Tensor, "time"]
    """Log-probability of each token, given the image and the tokens before it."""
    attention: Float[Tensor, "time region"] | None
    """Attention weights for each token; None without attention."""


@torch.no_grad()
def score_captions(
    decoder: StepDecoder, features: Features, captions: Sequence[Sequence[int]]
) -> list[TokenScores]:
    """Return the token scores of captions, read by the decoder's `step`.

    Probabilities are over the whole vocabulary, without the constraints or temperature of a search. Captions
    have no START and PAD, and END only where it was generated.
    """
    start = read_prefix(decoder, features, ())
    tokens, state = start.tokens, start.state
    longest = max(map(len, captions), default=0)
    rows = [[*caption, *[PAD] * (longest - len(caption))] for caption in captions]
    sequences = torch.tensor(rows, dtype=torch.long, device=tokens.device).view(len(captions), longest)
    log_probs, attentions = torch.zeros(len(captions), longest, device=tokens.device), []
    for time, words in enumerate(sequences.unbind(1)):
        logits, state, attention = decoder.step(tokens, state)
        log_probs[:, time] = logits.float().log_softmax(1).gather(1, words.unsqueeze(1)).squeeze(1)
        attentions += [] if attention is None else [attention.float()]
        tokens = words
    attention = torch.stack(attentions, 1) if attentions else None
    return [
        TokenScores(
            log_probs[row, : len(caption)],
            attention[row, : len(caption)] if attention is not None and caption else None,
        )
        for row, caption in enumerate(captions)
    ]
