"""The recurrent networks that write captions.

Decoders share two functions, which search, sampling and ensembles are written against: `start(features) ->
state` and `step(tokens, state) -> (logits, state, attention)`. Training uses `teacher_forced`, which knows all words
beforehand and keeps out of the recurrence what it can.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders.attention import AttentionDecoder
from captionscale.model.decoders.plain import PlainDecoder
from captionscale.model.decoders.top_down import TopDownDecoder


@runtime_checkable
class Decoder(Protocol):
    """Whatever says the next word."""

    def start(self, features: Any) -> Any:
        """Return the state before any word, of each image: what `select` reorders."""

    def step(
        self, tokens: Int[Tensor, "batch"], state: Any
    ) -> tuple[Float[Tensor, "batch word"], Any, Float[Tensor, "batch region"] | None]:
        """Return the logits of the next word, the state after this one, and where the decoder looked."""


DECODERS: dict[str, type[PlainDecoder | AttentionDecoder | TopDownDecoder]] = {
    "plain": PlainDecoder,
    "attention": AttentionDecoder,
    "top_down": TopDownDecoder,
}
