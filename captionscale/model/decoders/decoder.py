"""The decoder's interface, for search, training and plug-ins."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from captionscale import plugins
from captionscale.config_model import DECODERS, DecoderConfig, find_place
from captionscale.vocab import PAD, START

State = TypeVar("State", bound=tuple[Any, ...])


@runtime_checkable
class StepDecoder(Protocol):
    """A decoder as search sees it; `Decoder`, an ensemble and an exported program are one."""

    def start(self, features: Any) -> Any:
        """Return the state before the first word, a row for each image."""

    def step(
        self, tokens: Int[Tensor, "row"], state: Any
    ) -> tuple[Float[Tensor, "row word"], Any, Float[Tensor, "row region"] | None]:
        """Read one token per row: the next word's logits, the next state, and attention weights."""

    def select(self, state: Any, rows: Int[Tensor, "selected"]) -> Any:
        """Return the state of these rows, in this order; a row may occur several times."""


class Decoder(nn.Module):
    """Base class of decoders: a new one implements `__init__`, `start` and `step`.

    A state is a (named) tuple of tensors or tuples, with the row first. It may grow, as key/value caches do.
    Every other method has a default that works; override `teacher_forced` where all words at once are faster.
    """

    Config: ClassVar[type[DecoderConfig]]
    """Options in the config's section `model.decoder`."""

    def __init__(self, config: DecoderConfig, feature_size: int, vocab_size: int):
        """Build a decoder with random weights; `feature_size` is that of a region."""
        super().__init__()
        self.config, self.feature_size, self.vocab_size = config, feature_size, vocab_size

    def start(self, features: Float[Tensor, "image region feature"]) -> Any:
        """Return the state before the first word, a row for each image."""
        raise NotImplementedError

    def step(
        self, tokens: Int[Tensor, "row"], state: Any
    ) -> tuple[Float[Tensor, "row word"], Any, Float[Tensor, "row region"] | None]:
        """Read one token per row.

        Returns:
            Logits of the next word, the next state, and attention weights: non-negative, summing to one; None
            if `Config.has_attention` is false.
        """
        raise NotImplementedError

    def teacher_forced(
        self,
        features: Float[Tensor, "image region feature"],
        tokens: Int[Tensor, "caption time"],
        lengths: Sequence[int],
        image_index: Int[Tensor, "caption"],
    ) -> tuple[Float[Tensor, "token word"], Float[Tensor, "caption time region"] | None]:
        """Read whole captions; equal to `step` at each word.

        Args:
            features: Of each image.
            tokens: Start token and words, then padding.
            lengths: Number of tokens to read of each caption, 1 or more; known to the host.
            image_index: Row of `features` for each caption.

        Returns:
            Logits of the word after each token, without padding, caption after caption (`packed_index`); and
            attention weights, undefined at padding.
        """
        return scheduled_sampling(self, features, tokens, lengths, image_index, 0.0)

    def without_dropout(self) -> "Decoder":
        """Switch dropout off for good, also in training mode, and return self."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
                module.dropout = 0.0
        return self

    def select(self, state: State, rows: Int[Tensor, "selected"]) -> State:
        """Return the state of these rows, in this order; a row may occur several times."""
        return select(state, rows)


def decoder_class(name: str) -> type[Decoder]:
    """Return the class of a decoder by its name or `module:Class`.

    Raises:
        UserError: It cannot be imported, or is no `Decoder`.
    """
    return plugins.load(find_place(name, DECODERS) or name, Decoder)


def select(state: State, rows: Int[Tensor, "selected"]) -> State:
    """Return these rows of nested tuples of tensors."""
    parts = [select(part, rows) if isinstance(part, tuple) else part[rows] for part in state]
    # A NamedTuple takes its fields one by one.
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def packed_index(lengths: Sequence[int], time: int, device: torch.device) -> Int[Tensor, "token"]:
    """Return the flat positions of tokens that are no padding, caption after caption."""
    index = np.flatnonzero(np.arange(time) < np.asarray(lengths, dtype=np.int64)[:, None])
    return torch.as_tensor(index, device=device)


def scheduled_sampling(
    decoder: StepDecoder,
    features: Float[Tensor, "image region feature"],
    tokens: Int[Tensor, "caption time"],
    lengths: Sequence[int],
    image_index: Int[Tensor, "caption"],
    sampling_prob: float,
) -> tuple[Float[Tensor, "token word"], Float[Tensor, "caption time region"] | None]:
    """Read captions like `teacher_forced`, replacing words with samples of the decoder.

    With y the reference and y' what is read, each word after the first is

        y'_t ~ p(y_t | y'_1 .. y'_{t-1}) with probability sampling_prob, else y'_t = y_t.

    No gradient flows through a sample. Padding stays padding; PAD and START are never sampled.

    Source:
        Bengio et al. 2015, "Scheduled Sampling" (arXiv:1506.03099), section 2.4, with epsilon = 1 - p.
    """
    state, word = decoder.select(decoder.start(features), image_index), tokens[:, 0]
    logits: list[Tensor] = []
    attentions: list[Tensor] = []
    for time in range(tokens.shape[1]):
        if time:
            word = tokens[:, time]
            if sampling_prob:
                sampled = (torch.rand(len(tokens), device=tokens.device) < sampling_prob) & (word != PAD)
                word = torch.where(sampled, _sample(logits[-1]), word)
        step_logits, state, attention = decoder.step(word, state)
        logits.append(step_logits)
        attentions += [] if attention is None else [attention]
    packed = torch.stack(logits, 1).flatten(0, 1)[packed_index(lengths, tokens.shape[1], tokens.device)]
    return packed, torch.stack(attentions, 1) if attentions else None


@torch.no_grad()
def _sample(logits: Float[Tensor, "caption word"]) -> Int[Tensor, "caption"]:
    """Sample a word for each row."""
    probs = logits.float().softmax(1)
    for token in (PAD, START):
        probs[:, token] = -1
    # torch.multinomial computes the same, but waits for the device and raises on NaN.
    return (probs / torch.empty_like(probs).exponential_()).argmax(1)
