"""Show, Attend and Tell: a decoder with attention to regions at each word."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from captionscale.config_model import AttentionConfig
from captionscale.model.decoders.additive_attention import AttendingDecoder
from captionscale.model.decoders.recurrence import AttentionState, fused_attention_lstm


class AttentionDecoder(AttendingDecoder):
    """An LSTM that attends to regions of the image before each word.

    With a = relu(A regions), y_t the words, E y_t their embeddings and h_t the last layer's state:

        z_t = attention(a, h_{t-1}), or beta_t times that        (4 to 6)
        beta_t = sigmoid(F h_{t-1}), with `attention_gate`       (section 4.2.1)
        h_t = LSTM([E y_t, z_t], h_{t-1})                        (1 to 3)
        p(y_{t+1}) = softmax(output(E y_t, h_t, z_t))            (7, with word_head = "deep")

    Higher layers read the layer below. A tanh layer computes the first states from the mean of a. With
    `region_size` = 0, a is the regions themselves, as encoders return nothing below zero.

    Source:
        Xu et al. 2015, "Show, Attend and Tell" (arXiv:1502.03044), soft attention, with its equation
        numbers. There the gate is no option, the LSTM has one layer, two deeper networks compute the first
        states, and attention reads the encoder's features (`region_size` = 0). Ours are projected, as in
        Rennie et al. 2017 (arXiv:1612.00563): a quarter of the cost on ResNet-50's 2,048 features.
        The doubly stochastic penalty is part of the loss: `train.doubly_stochastic_weight`.
    """

    Config = AttentionConfig
    config: AttentionConfig

    def __init__(self, config: AttentionConfig, feature_size: int, vocab_size: int):
        super().__init__(config, feature_size, vocab_size)
        embed, hidden, layers = config.embed_size, config.hidden_size, config.num_layers
        self.build_embedding()
        region = self.build_regions()
        self.initial_state = nn.Linear(region, 2 * layers * hidden)
        inputs = [embed + region] + [hidden] * (layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(size, hidden) for size in inputs)
        self.build_head(region)
        self.gate = nn.Linear(hidden, 1) if config.attention_gate else None

    def start(self, features: Float[Tensor, "image region feature"]) -> AttentionState:
        """Return the state before the first word."""
        regions = self.project(features)
        states = torch.tanh(self.initial_state(regions.mean(1)))
        states = torch.unflatten(states, 1, (2, len(self.cells), -1))
        return AttentionState(regions, self.attention.key(regions), states[:, 0], states[:, 1])

    def recur(
        self, word: Float[Tensor, "row embed"], state: AttentionState
    ) -> tuple[tuple[Tensor, Tensor, Tensor], AttentionState]:
        """Read one word embedding."""
        before = state.hidden[:, -1]
        context, weights = self.attention(state.regions, state.keys, before, state.image_index)
        if self.gate is not None:
            context = self.gate(before).sigmoid() * context
        below = torch.cat([word, context], 1)
        hiddens, cells = [], []
        for layer, lstm in enumerate(self.cells):
            below, cell = lstm(below, (state.hidden[:, layer], state.cell[:, layer]))
            hiddens.append(below)
            cells.append(cell)
        state = state._replace(hidden=torch.stack(hiddens, 1), cell=torch.stack(cells, 1))
        return (below, context, weights), state

    def recur_all(
        self,
        words: Float[Tensor, "caption time embed"],
        lengths: Sequence[int],
        image_index: Int[Tensor, "caption"],
        state: AttentionState,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read all word embeddings by the fused recurrence."""
        return fused_attention_lstm(words, lengths, image_index, state, self.attention, self.gate, self.cells)
