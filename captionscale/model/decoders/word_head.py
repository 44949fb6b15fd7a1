"""Words as vectors, and vectors as the next word: what all decoders share.

A decoder holds these layers under the names of `HasWordHead`, so that their parameters are named as its own.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from captionscale import config
from captionscale.model.decoders.dropout import Dropout
from captionscale.vocab import PAD

DropoutMasks = tuple[Tensor, Tensor] | tuple[()]
"""What dropout multiplies the vectors of words and of the output by, at all words of a caption. Empty: its
words do not share masks."""


class OutputBias(nn.Module):
    """What is left of the output's last layer if its matrix is that of the words' vectors."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))


class WordHead(NamedTuple):
    """The layers between a decoder's state and the next word's logits."""

    from_word: nn.Module | None
    from_hidden: nn.Module
    from_context: nn.Linear | None
    output_projection: nn.Linear | OutputBias


@runtime_checkable
class HasWordHead(Protocol):
    """A decoder, as far as its words go."""

    embedding: nn.Embedding
    dropout: Dropout
    from_word: nn.Module | None
    from_hidden: nn.Module
    from_context: nn.Linear | None
    output_projection: nn.Linear | OutputBias


def build_embedding(settings: config.Decoder, vocab_size: int) -> nn.Embedding:
    """Return the words' vectors; if they are the output's matrix too, they begin as small as one."""
    vectors = nn.Embedding(vocab_size, settings.embed_size, padding_idx=PAD)
    if settings.tie_weights or settings.embedding_init == "unit_norm":
        with torch.no_grad():
            vectors.weight.div_(settings.embed_size**0.5)
    return vectors


def build_layers(settings: config.Decoder, context: int | None, vocab_size: int) -> WordHead:
    """Return the layers that `logits` reads words with.

    Args:
        settings: `word_head` and `tie_weights` choose.
        context: Size of what attention saw; None: the decoder has no attention.
        vocab_size: Size of the vocabulary.
    """
    embed, hidden = settings.embed_size, settings.hidden_size
    if settings.word_head == "linear":
        size = embed if settings.tie_weights else hidden
        from_hidden = nn.Identity() if size == hidden else nn.Linear(hidden, size, bias=False)
        return WordHead(
            None,
            from_hidden,
            None,
            OutputBias(vocab_size) if settings.tie_weights else nn.Linear(size, vocab_size),
        )
    size = 2 * embed if settings.word_head == "maxout" else embed
    return WordHead(
        from_word=nn.Linear(embed, size, bias=False) if settings.word_head == "maxout" else nn.Identity(),
        from_hidden=nn.Linear(hidden, size),
        from_context=None if context is None else nn.Linear(context, size, bias=False),
        output_projection=OutputBias(vocab_size) if settings.tie_weights else nn.Linear(embed, vocab_size),
    )


def dropout_masks(decoder: HasWordHead, captions: int) -> DropoutMasks:
    """Draw what training hides at all words of captions."""
    matrix = _matrix(decoder)
    word = decoder.dropout.mask(captions, decoder.embedding.embedding_dim, matrix.device)
    output = decoder.dropout.mask(captions, matrix.shape[1], matrix.device)
    return () if word is None or output is None else (word, output)


def embed_tokens(
    decoder: HasWordHead, tokens: Int[Tensor, "*batch"], masks: DropoutMasks
) -> Float[Tensor, "*batch embed"]:
    """Return the vectors of words, with dropout."""
    vectors: Tensor = decoder.dropout(decoder.embedding(tokens), masks[0] if masks else None)
    return vectors


def logits(
    decoder: HasWordHead,
    word: Float[Tensor, "*batch embed"],
    hidden: Float[Tensor, "*batch hidden"],
    context: Float[Tensor, "*batch context"] | None,
    masks: DropoutMasks,
    rows: Int[Tensor, "row"] | None = None,
) -> Float[Tensor, "*batch word"] | Float[Tensor, "row word"]:
    """Return the logits of the next word.

    With e the vector of the word that was read, h the state, z what attention saw (a decoder without it lacks
    that part), V the output's matrix (tied: that of the words' vectors), and dropout in training:

    - linear: V dropout(h) + b, or V dropout(P h) + b if tied vectors have another size than h;
    - deep: V dropout(e + H h + Z z) + b;
    - maxout: V dropout(m) + b, of m_i = max(r_2i, r_2i+1) and r = W e + H h + Z z, twice as long as e.

    Biases of H are left out here.

    Args:
        decoder: The decoder.
        word: e, as the recurrence read it.
        hidden: h.
        context: z.
        masks: Of this caption.
        rows: Only of these words, counted caption after caption; without them, of all.

    Source:
        Deep: Xu et al. 2015 (arXiv:1502.03044), equation 7, after Pascanu et al. 2014 (arXiv:1312.6026).
        Maxout: Bahdanau et al. 2015 (arXiv:1409.0473), appendix A.2.2, after Goodfellow et al. 2013
        (arXiv:1302.4389). Tied: Press and Wolf 2017 (arXiv:1608.05859).
    """
    reading = decoder.from_hidden(hidden)
    if decoder.from_word is not None:
        reading = decoder.from_word(word) + reading
    if decoder.from_context is not None:
        reading = reading + decoder.from_context(context)
    matrix = _matrix(decoder)
    if reading.shape[-1] > matrix.shape[1]:
        reading = reading.unflatten(-1, (-1, 2)).amax(-1)
    reading = decoder.dropout(reading, masks[1] if masks else None)
    if rows is not None:
        reading = reading.flatten(0, -2).index_select(0, rows)
    return F.linear(reading, matrix, decoder.output_projection.bias)


def _matrix(decoder: HasWordHead) -> Float[Tensor, "word size"]:
    """Return the output's matrix."""
    layer = (
        decoder.embedding if isinstance(decoder.output_projection, OutputBias) else decoder.output_projection
    )
    return layer.weight
