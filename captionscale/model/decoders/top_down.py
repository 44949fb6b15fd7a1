"""Bottom-Up and Top-Down: a decoder with an LSTM for attention and one for language."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captionscale.config_model import TopDownConfig
from captionscale.model.decoders.additive_attention import AttendingDecoder, ImageIndex
from captionscale.model.decoders.recurrent import DropoutMasks


class TopDownState(NamedTuple):
    """Regions of the image and the state of both LSTMs."""

    regions: Float[Tensor, "image region size"]
    keys: Float[Tensor, "image region attention"]
    mean: Float[Tensor, "row size"]
    """Of the regions."""
    hidden: Float[Tensor, "row 2 hidden"]
    """Of the attention LSTM, then of the language LSTM."""
    cell: Float[Tensor, "row 2 hidden"]
    masks: DropoutMasks = ()
    image_index: ImageIndex = ()


class TopDownDecoder(AttendingDecoder):
    """One LSTM attends, another predicts the next word.

    With a = relu(A regions), m their mean, y_t the words, E y_t their embeddings, and h1 and h2 the states of
    the two LSTMs, zero at first:

        h1_t = LSTM1([h2_{t-1}, m, E y_t], h1_{t-1})             (1, 2)
        z_t = attention(a, h1_t)                                 (3 to 5)
        h2_t = LSTM2([z_t, h1_t], h2_{t-1})                      (1, 6)
        p(y_{t+1}) = softmax(output(E y_t, h2_t, z_t))           (7, with word_head = "linear")

    Source:
        Anderson et al. 2018, "Bottom-Up and Top-Down Attention" (arXiv:1707.07998), section 3.2, with its
        equation numbers. There regions are a detector's boxes, and not projected; ours are the encoder's
        grid, projected as in Luo's self-critical.pytorch, unless `region_size` = 0.
    """

    Config = TopDownConfig

    def __init__(self, config: TopDownConfig, feature_size: int, vocab_size: int):
        super().__init__(config, feature_size, vocab_size)
        hidden = config.hidden_size
        self.build_embedding()
        region = self.build_regions()
        self.attention_lstm = nn.LSTMCell(hidden + region + config.embed_size, hidden)
        self.language_lstm = nn.LSTMCell(region + hidden, hidden)
        self.build_head(region)

    def start(self, features: Float[Tensor, "image region feature"]) -> TopDownState:
        """Return the state before the first word."""
        regions = self.project(features)
        zeros = regions.new_zeros(regions.shape[0], 2, self.config.hidden_size)
        return TopDownState(regions, self.attention.key(regions), regions.mean(1), zeros, zeros)

    def recur(
        self, word: Float[Tensor, "row embed"], state: TopDownState
    ) -> tuple[tuple[Tensor, Tensor, Tensor], TopDownState]:
        """Read one word embedding."""
        (attending, language), (attending_cell, language_cell) = state.hidden.unbind(1), state.cell.unbind(1)
        attending, attending_cell = self.attention_lstm(
            torch.cat([language, state.mean, word], 1), (attending, attending_cell)
        )
        context, weights = self.attention(state.regions, state.keys, attending, state.image_index)
        language, language_cell = self.language_lstm(
            torch.cat([context, attending], 1), (language, language_cell)
        )
        hidden = torch.stack([attending, language], 1)
        cell = torch.stack([attending_cell, language_cell], 1)
        return (language, context, weights), state._replace(hidden=hidden, cell=cell)
