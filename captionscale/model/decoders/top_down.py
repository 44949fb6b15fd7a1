"""The decoder whose attention has an LSTM of its own."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from captionscale import config
from captionscale.model.decoders import word_head
from captionscale.model.decoders.additive_attention import AdditiveAttention, build_region_projection
from captionscale.model.decoders.dropout import Dropout
from captionscale.model.decoders.state import ImageIndex, select
from captionscale.model.decoders.teacher_forcing import decode_step, run_teacher_forced
from captionscale.model.decoders.word_head import DropoutMasks


class TopDownState(NamedTuple):
    """The image and the memory of both LSTMs."""

    regions: Float[Tensor, "batch region size"]
    keys: Float[Tensor, "batch region attend"]
    mean: Float[Tensor, "batch size"]
    """Of the regions."""
    hidden: Float[Tensor, "batch 2 hidden"]
    """Of the attention's LSTM, then of that of language."""
    cell: Float[Tensor, "batch 2 hidden"]
    masks: DropoutMasks = ()
    image_index: ImageIndex = ()


class TopDownDecoder(nn.Module):
    """Let one LSTM look, and another one speak.

    With a = relu(A regions), m their mean, y_t the words, E y_t their vectors, and h1 and h2 the states of
    the two LSTMs, zero at first:

        h1_t = LSTM1([h2_{t-1}, m, E y_t], h1_{t-1})             (1, 2)
        z_t = attention(a, h1_t)                                 (3 to 5)
        h2_t = LSTM2([z_t, h1_t], h2_{t-1})                      (1, 6)
        p(y_{t+1}) = softmax(output(E y_t, h2_t, z_t))           (7, with word_head = "linear")

    Source:
        Anderson et al. 2018, "Bottom-Up and Top-Down Attention" (arXiv:1707.07998), section 3.2, with its
        equations' numbers. There regions are boxes of a detector, and their features are looked at as they
        are; ours are the encoder's grid, projected, as Luo's self-critical.pytorch does, unless `region_size` = 0.
    """

    def __init__(self, settings: config.Decoder, feature_size: int, vocab_size: int):
        """Build a decoder with random weights.

        Args:
            settings: The config's section `model.decoder`.
            feature_size: Size of a region's feature.
            vocab_size: Size of the vocabulary.
        """
        super().__init__()
        hidden = settings.hidden_size
        self.embedding = word_head.build_embedding(settings, vocab_size)
        self.dropout = Dropout(settings.dropout, settings.variational_dropout)
        self.region_projection, region = build_region_projection(settings, feature_size)
        self.attention = AdditiveAttention(region, hidden, settings.attention_size)
        self.attention_lstm = nn.LSTMCell(hidden + region + settings.embed_size, hidden)
        self.language_lstm = nn.LSTMCell(region + hidden, hidden)
        self.from_word, self.from_hidden, self.from_context, self.output_projection = word_head.build_layers(
            settings, region, vocab_size
        )

    def start(self, features: Float[Tensor, "batch region feature"]) -> TopDownState:
        """Return the state before any word."""
        regions = self.dropout(self.region_projection(features).relu())
        memory = regions.new_zeros(regions.shape[0], 2, self.attention_lstm.hidden_size)
        return TopDownState(regions, self.attention.keys(regions), regions.mean(1), memory, memory)

    def step(
        self, tokens: Int[Tensor, "batch"], state: TopDownState
    ) -> tuple[Float[Tensor, "batch word"], TopDownState, Float[Tensor, "batch region"]]:
        """Read one word for each row.

        Returns:
            The logits of the next word, the state after this one, and where the decoder looked.
        """
        return decode_step(self, self._recur, tokens, state)

    def teacher_forced(
        self,
        features: Float[Tensor, "image region feature"],
        tokens: Int[Tensor, "caption time"],
        image_index: Int[Tensor, "caption"],
        rows: Int[Tensor, "row"] | None = None,
    ) -> tuple[
        Float[Tensor, "caption time word"] | Float[Tensor, "row word"], Float[Tensor, "caption time region"]
    ]:
        """Return the logits of each word that follows, or of these rows, and where the decoder looked."""
        return run_teacher_forced(self, self._recur, tokens, select(self.start(features), image_index), rows)

    def _recur(
        self, word: Float[Tensor, "batch embed"], state: TopDownState
    ) -> tuple[tuple[Tensor, Tensor, Tensor], TopDownState]:
        """Return the state of language, what was seen and where, and the state."""
        (look, speech), (look_cell, speech_cell) = state.hidden.unbind(1), state.cell.unbind(1)
        look, look_cell = self.attention_lstm(torch.cat([speech, state.mean, word], 1), (look, look_cell))
        context, weights = self.attention(state.regions, state.keys, look, state.image_index)
        speech, speech_cell = self.language_lstm(torch.cat([context, look], 1), (speech, speech_cell))
        hidden, cell = torch.stack([look, speech], 1), torch.stack([look_cell, speech_cell], 1)
        return (speech, context, weights), state._replace(hidden=hidden, cell=cell)
