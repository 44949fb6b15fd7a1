"""What captions may not say, and what they must: kept by every way of finding them."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders.registry import Decoder
from captionscale.vocab import END, PAD, START, UNK

Features: TypeAlias = Float[Tensor, "image region feature"] | tuple[Float[Tensor, "image _ _"], ...]
"""What a decoder starts from: of an ensemble, what each of its members sees."""


@dataclass(frozen=True)
class Constraints:
    """What a caption may not say, and what it must, as tokens.

    Padding and the start are never said.
    """

    no_repeat_ngram_size: int = 0
    """No so many words in a row come twice, but for those of the prefix; 0: they may."""
    allow_unknown: bool = False
    """Whether the token of unknown words may be said."""
    dangling_tokens: tuple[int, ...] = ()
    """A caption does not end in one of these."""
    prefix: tuple[int, ...] = ()
    """Every caption begins with these."""
    required: tuple[tuple[int, ...], ...] = ()
    """Of each of these groups every caption says a word; only `search` can have it so."""

    def mask_logits(
        self, logits: Float[Tensor, "row word"], sequences: Int[Tensor, "row time"], max_words: int
    ) -> None:
        """Set to minus infinity, in place, what may not come next.

        A caption that is cut at `max_words` ends there, so that it does not say a dangling word last. Where
        nothing at all may come next, as only a tiny vocabulary knows it, the caption ends after all.

        Args:
            logits: Logits or logarithms of probabilities.
            sequences: The words of each caption so far.
            max_words: Greatest number of words.
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
            mute = logits.amax(1) == -torch.inf
            logits[:, END] = torch.where(mute, end, logits[:, END])

    def satisfied(self, *tokens: int) -> int:
        """Return the set of required groups that these tokens have a word of: bit i is group i."""
        return sum(1 << bit for bit, group in enumerate(self.required) if {*group} & {*tokens})


UNCONSTRAINED = Constraints()
"""Nothing but the unknown token is forbidden."""


class PrefixState(NamedTuple):
    """Where captions begin, a row for each image."""

    tokens: Int[Tensor, "image"]
    """The next to be read: the last of the prefix."""
    state: tuple[Any, ...]
    sequences: Int[Tensor, "image time"]
    log_prob: Float[Tensor, "image"]
    """Of the prefix."""
    attentions: tuple[Float[Tensor, "image region"], ...]
    """Where the decoder looked for each word of the prefix; of one without attention none."""


def read_prefix(decoder: Decoder, features: Features, prefix: tuple[int, ...]) -> PrefixState:
    """Let a decoder read the prefix, once for each image."""
    first = features if isinstance(features, Tensor) else features[0]
    state, attentions = decoder.start(features), []
    tokens = torch.full((len(first),), START, device=first.device)
    total = torch.zeros(len(first), device=first.device)
    for token in prefix:
        logits, state, attention = decoder.step(tokens, state)
        total += logits.float().log_softmax(1)[:, token]
        tokens = torch.full_like(tokens, token)
        attentions += [] if attention is None else [attention.float()]
    sequences = torch.tensor(prefix, dtype=torch.long, device=first.device).expand(len(first), -1)
    return PrefixState(tokens, state, sequences, total, tuple(attentions))
