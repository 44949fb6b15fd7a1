"""Constraints on captions, and the prefix that they begin with."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders.decoder import StepDecoder
from captionscale.vocab import END, PAD, START, UNK

Features: TypeAlias = Float[Tensor, "image region feature"] | tuple[Float[Tensor, "image _ _"], ...]
"""What a decoder starts from; of an ensemble, each member's features."""


@dataclass(frozen=True)
class Constraints:
    """What captions must not and must contain, as tokens. PAD and START are never generated."""

    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice, except within the prefix; 0: no such constraint."""
    allow_unknown: bool = False
    """Whether UNK may be generated."""
    dangling_tokens: tuple[int, ...] = ()
    """A caption does not end in one of these."""
    prefix: tuple[int, ...] = ()
    """Every caption begins with these."""
    required: tuple[tuple[int, ...], ...] = ()
    """Every caption contains a token of each of these groups; `search` only."""

    def mask_logits(
        self, logits: Float[Tensor, "row word"], sequences: Int[Tensor, "row time"], max_words: int
    ) -> None:
        """Set the logits of forbidden next tokens to minus infinity, in place.

        A caption cut at `max_words` does not end in a dangling word either. If nothing is left, as in a tiny
        vocabulary, the caption ends after all. Log-probabilities serve as well as logits.
        """
        time, end = sequences.shape[1], logits[:, END].clone()
        for token in (PAD, START) if self.allow_unknown else (PAD, START, UNK):
            logits[:, token] = -torch.inf
        size = self.no_repeat_ngram_size
        if 0 < size <= time:
            ngrams = sequences.unfold(1, size, 1)
            begun = (ngrams[:, :, :-1] == sequences[:, None, time - size + 1 :]).all(2)
            logits.scatter_(1, torch.where(begun, ngrams[:, :, -1], PAD), -torch.inf)
        if self.dangling_tokens:
            dangling = torch.tensor(self.dangling_tokens, device=sequences.device)
            if time == max_words - 1:
                logits[:, dangling] = -torch.inf
            if time:
                logits[:, END].masked_fill_(torch.isin(sequences[:, -1], dangling), -torch.inf)
            stuck = logits.amax(1) == -torch.inf
            logits[:, END] = torch.where(stuck, end, logits[:, END])

    def satisfied(self, *tokens: int) -> int:
        """Return the set of required groups with one of these tokens: bit i is group i."""
        return sum(1 << bit for bit, group in enumerate(self.required) if {*group} & {*tokens})


UNCONSTRAINED = Constraints()
"""UNK is forbidden, nothing else."""


class PrefixState(NamedTuple):
    """What a decoder knows after the prefix, a row for each image."""

    tokens: Int[Tensor, "image"]
    """The next to read: the last of the prefix, or START."""
    state: Any
    sequences: Int[Tensor, "image time"]
    log_probs: Float[Tensor, "image"]
    """Log-probability of the prefix."""


def read_prefix(decoder: StepDecoder, features: Features, prefix: tuple[int, ...]) -> PrefixState:
    """Read the prefix once for each image."""
    first = features if isinstance(features, Tensor) else features[0]
    state, count = decoder.start(features), len(first)
    tokens = torch.full((count,), START, device=first.device)
    log_probs = torch.zeros(count, device=first.device)
    for token in prefix:
        logits, state, _ = decoder.step(tokens, state)
        log_probs += logits.float().log_softmax(1)[:, token]
        tokens = torch.full_like(tokens, token)
    sequences = torch.tensor(prefix, dtype=torch.long, device=first.device).expand(count, -1)
    return PrefixState(tokens, state, sequences, log_probs)
