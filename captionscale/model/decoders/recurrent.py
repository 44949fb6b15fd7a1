"""Word embedding, dropout and output layer that the decoders with an LSTM share."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from captionscale.config_model import RecurrentConfig
from captionscale.model.decoders.decoder import Decoder, packed_index
from captionscale.model.decoders.dropout import Dropout
from captionscale.vocab import PAD

DropoutMasks = tuple[Tensor, Tensor] | tuple[()]
"""Variational dropout's masks of word embeddings and of the output layer; empty: each word has its own."""


class OutputBias(nn.Module):
    """Output bias when weights are tied to the embedding."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))


class RecurrentDecoder(Decoder):
    """Base class of decoders with an LSTM: they implement `start` and `recur`.

    A state is a NamedTuple with a field `masks`.
    """

    config: RecurrentConfig
    from_word: nn.Module | None
    from_hidden: nn.Module
    from_context: nn.Linear | None
    output_projection: nn.Linear | OutputBias

    def build_embedding(self) -> None:
        """Add the word embedding, scaled like an output matrix if it is one, and dropout."""
        config = self.config
        self.embedding = nn.Embedding(self.vocab_size, config.embed_size, padding_idx=PAD)
        if config.tie_weights or config.embedding_init == "unit_norm":
            with torch.no_grad():
                self.embedding.weight.div_(config.embed_size**0.5)
        self.dropout = Dropout(config.dropout, config.variational_dropout)

    def build_head(self, context_size: int | None) -> None:
        """Add the layers of `logits`; without a context size, those of a decoder without attention."""
        kind, embed, hidden = self.config.word_head, self.config.embed_size, self.config.hidden_size
        size = hidden if kind == "linear" and not self.config.tie_weights else embed
        width = 2 * embed if kind == "maxout" else size
        self.from_word = self.from_context = None
        if kind == "linear":
            self.from_hidden = nn.Identity() if size == hidden else nn.Linear(hidden, size, bias=False)
        else:
            self.from_word = nn.Linear(embed, width, bias=False) if kind == "maxout" else nn.Identity()
            self.from_hidden = nn.Linear(hidden, width)
            if context_size is not None:
                self.from_context = nn.Linear(context_size, width, bias=False)
        tied = self.config.tie_weights
        self.output_projection = OutputBias(self.vocab_size) if tied else nn.Linear(size, self.vocab_size)

    def recur(self, word: Float[Tensor, "row embed"], state: Any) -> tuple[tuple[Any, Any, Any], Any]:
        """Read one word embedding: (hidden, context | None, attention | None), and the next state."""
        raise NotImplementedError

    def recur_all(
        self,
        words: Float[Tensor, "caption time embed"],
        lengths: Sequence[int],  # noqa: ARG002
        image_index: Int[Tensor, "caption"],
        state: Any,
    ) -> tuple[Any, Any, Any]:
        """Read all word embeddings from the state of the images; as `recur`, with time second."""
        state, times = self.select(state, image_index), []
        for word in words.unbind(1):
            parts, state = self.recur(word, state)
            times.append(parts)
        hidden, context, attention = (
            None if part[0] is None else torch.stack(part, 1) for part in zip(*times, strict=True)
        )
        return hidden, context, attention

    def step(
        self, tokens: Int[Tensor, "row"], state: Any
    ) -> tuple[Float[Tensor, "row word"], Any, Float[Tensor, "row region"] | None]:
        """Read one token per row, as `Decoder.step` does."""
        # len(tokens) would fix the batch size of an exported program.
        masks = state.masks or self._dropout_masks(tokens.shape[0])
        word = self._embed(tokens, masks)
        (hidden, context, attention), state = self.recur(word, state)
        return self._logits(word, hidden, context, masks), state._replace(masks=masks), attention

    def teacher_forced(
        self,
        features: Float[Tensor, "image region feature"],
        tokens: Int[Tensor, "caption time"],
        lengths: Sequence[int],
        image_index: Int[Tensor, "caption"],
    ) -> tuple[Float[Tensor, "token word"], Float[Tensor, "caption time region"] | None]:
        """Read whole captions, with embedding and output layer outside the recurrence."""
        state, masks = self.start(features), self._dropout_masks(len(tokens))
        words = self._embed(tokens, masks)
        hidden, context, attention = self.recur_all(words, lengths, image_index, state)
        packed = packed_index(lengths, tokens.shape[1], tokens.device)
        return self._logits(words, hidden, context, masks, packed), attention

    def _dropout_masks(self, captions: int) -> DropoutMasks:
        matrix = self._output_matrix()
        word = self.dropout.mask(captions, self.embedding.embedding_dim, matrix.device)
        output = self.dropout.mask(captions, matrix.shape[1], matrix.device)
        return () if word is None or output is None else (word, output)

    def _embed(self, tokens: Int[Tensor, "*batch"], masks: DropoutMasks) -> Float[Tensor, "*batch embed"]:
        embedded: Tensor = self.dropout(self.embedding(tokens), masks[0] if masks else None)
        return embedded

    def _logits(
        self,
        word: Float[Tensor, "*batch embed"],
        hidden: Float[Tensor, "*batch hidden"],
        context: Float[Tensor, "*batch context"] | None,
        masks: DropoutMasks,
        packed: Int[Tensor, "token"] | None = None,
    ) -> Float[Tensor, "*batch word"] | Float[Tensor, "token word"]:
        """Return the logits of the next word; of the words at `packed` only, if given.

        With e the embedding of the word just read, h the state, z the context (without attention there is
        none), V the output matrix (tied: the embedding), and dropout in training:

        - linear: V dropout(h) + b, or V dropout(P h) + b if tied embeddings have another size than h;
        - deep: V dropout(e + H h + Z z) + b;
        - maxout: V dropout(m) + b, with m_i = max(r_2i, r_2i+1) and r = W e + H h + Z z, twice as long as e.

        Source:
            Deep: Xu et al. 2015 (arXiv:1502.03044), equation 7, after Pascanu et al. 2014 (arXiv:1312.6026).
            Maxout: Bahdanau et al. 2015 (arXiv:1409.0473), appendix A.2.2, after Goodfellow et al. 2013
            (arXiv:1302.4389). Tied: Press and Wolf 2017 (arXiv:1608.05859).
        """
        output = self.from_hidden(hidden)
        if self.from_word is not None:
            output = self.from_word(word) + output
        if self.from_context is not None:
            output = output + self.from_context(context)
        matrix = self._output_matrix()
        if output.shape[-1] > matrix.shape[1]:
            output = output.unflatten(-1, (-1, 2)).amax(-1)
        output = self.dropout(output, masks[1] if masks else None)
        if packed is not None:
            output = output.flatten(0, -2).index_select(0, packed)
        return F.linear(output, matrix, self.output_projection.bias)

    def _output_matrix(self) -> Float[Tensor, "word size"]:
        tied = isinstance(self.output_projection, OutputBias)
        layer: Any = self.embedding if tied else self.output_projection
        weight: Tensor = layer.weight
        return weight
