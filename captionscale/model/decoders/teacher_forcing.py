"""How a decoder with attention reads: word by word, or captions at once."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders import word_head
from captionscale.model.decoders.word_head import HasWordHead

State = TypeVar("State", bound=Any)

Recurrence = Callable[[Tensor, State], tuple[tuple[Tensor, Tensor, Tensor], State]]
"""From a word's vector and a state: what the output reads of the LSTM, what attention saw and where; the next
state. Any NamedTuple with `masks` is a state."""


def decode_step(
    decoder: HasWordHead, recur: Recurrence[State], tokens: Int[Tensor, "batch"], state: State
) -> tuple[Float[Tensor, "batch word"], State, Float[Tensor, "batch region"]]:
    """Read one word for each row.

    Returns:
        The logits of the next word, the state after this one, and where the decoder looked.
    """
    masks = state.masks or word_head.dropout_masks(decoder, tokens.shape[0])
    word = word_head.embed_tokens(decoder, tokens, masks)
    (hidden, context, weights), state = recur(word, state)
    return word_head.logits(decoder, word, hidden, context, masks), state._replace(masks=masks), weights


def run_teacher_forced(
    decoder: HasWordHead,
    recur: Recurrence[State],
    tokens: Int[Tensor, "caption time"],
    state: State,
    rows: Int[Tensor, "row"] | None = None,
) -> tuple[
    Float[Tensor, "caption time word"] | Float[Tensor, "row word"], Float[Tensor, "caption time region"]
]:
    """Read all words, with their vectors and the output outside the recurrence.

    Returns:
        The logits of each word that follows, or of these rows, and where the decoder looked.
    """
    masks = state.masks or word_head.dropout_masks(decoder, tokens.shape[0])
    words = word_head.embed_tokens(decoder, tokens, masks)
    times = []
    for word in words.unbind(1):
        parts, state = recur(word, state)
        times.append(parts)
    hidden, context, weights = (torch.stack(parts, 1) for parts in zip(*times, strict=True))
    return word_head.logits(decoder, words, hidden, context, masks, rows), weights
