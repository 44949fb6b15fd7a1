"""The decoder that looks at regions for each word."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from captionscale import config
from captionscale.model.decoders import recurrence, word_head
from captionscale.model.decoders.additive_attention import AdditiveAttention, build_region_projection
from captionscale.model.decoders.dropout import Dropout
from captionscale.model.decoders.recurrence import AttentionState
from captionscale.model.decoders.teacher_forcing import decode_step


class AttentionDecoder(nn.Module):
    """Look at regions of the image for each word.

    With a = relu(A regions), y_t the words, E y_t their vectors and h_t the last layer's state:

        z_t = attention(a, h_{t-1}), or beta_t times that        (4 to 6)
        beta_t = sigmoid(F h_{t-1}), with `attention_gate`                 (section 4.2.1)
        h_t = LSTM([E y_t, z_t], h_{t-1})                        (1 to 3)
        p(y_{t+1}) = softmax(output(E y_t, h_t, z_t))            (7, with word_head = "deep")

    Further layers read the layer below. A layer with tanh reads the first states from the mean of a. With
    `region_size` = 0, a is the regions: an encoder gives none below zero.

    Source:
        Xu et al. 2015, "Show, Attend and Tell" (arXiv:1502.03044), soft attention, with its equations'
        numbers. There the gate is no option, the LSTM has one layer, two deeper networks read the first
        states, and attention looks at the encoder's own features. Ours looks at projected regions, as Rennie
        et al. 2017 do (arXiv:1612.00563): the recurrence then costs a quarter on ResNet-50's 2,048 features;
        theirs is `region_size` = 0.
        The doubly stochastic penalty is the loss's: `train.doubly_stochastic_weight`.
    """

    def __init__(self, settings: config.Decoder, feature_size: int, vocab_size: int):
        """Build a decoder with random weights.

        Args:
            settings: The config's section `model.decoder`.
            feature_size: Size of a region's feature.
            vocab_size: Size of the vocabulary.
        """
        super().__init__()
        embed, hidden, layers = settings.embed_size, settings.hidden_size, settings.num_layers
        self.embedding = word_head.build_embedding(settings, vocab_size)
        self.dropout = Dropout(settings.dropout, settings.variational_dropout)
        self.region_projection, region = build_region_projection(settings, feature_size)
        self.attention = AdditiveAttention(region, hidden, settings.attention_size)
        self.initial_state = nn.Linear(region, 2 * layers * hidden)
        inputs = [embed + region] + [hidden] * (layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(size, hidden) for size in inputs)
        self.from_word, self.from_hidden, self.from_context, self.output_projection = word_head.build_layers(
            settings, region, vocab_size
        )
        self.gate = nn.Linear(hidden, 1) if settings.attention_gate else None

    def start(self, features: Float[Tensor, "batch region feature"]) -> AttentionState:
        """Return the state before any word."""
        regions = self.dropout(self.region_projection(features).relu())
        memories = torch.tanh(self.initial_state(regions.mean(1)))
        memories = torch.unflatten(memories, 1, (2, len(self.cells), -1))
        return AttentionState(regions, self.attention.keys(regions), memories[:, 0], memories[:, 1])

    def step(
        self, tokens: Int[Tensor, "batch"], state: AttentionState
    ) -> tuple[Float[Tensor, "batch word"], AttentionState, Float[Tensor, "batch region"]]:
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
        start, masks = self.start(features), word_head.dropout_masks(self, len(tokens))
        words = word_head.embed_tokens(self, tokens, masks)
        hidden, context, weights = recurrence.fused_attention_lstm(
            words, tokens, image_index, start, self.attention, self.gate, self.cells
        )
        return word_head.logits(self, words, hidden, context, masks, rows), weights

    def _recur(
        self, word: Float[Tensor, "batch embed"], state: AttentionState
    ) -> tuple[tuple[Tensor, Tensor, Tensor], AttentionState]:
        """Return the last layer's state, what was seen and where, and the state."""
        before = state.hidden[:, -1]
        context, weights = self.attention(state.regions, state.keys, before, state.image_index)
        if self.gate is not None:
            context = self.gate(before).sigmoid() * context
        below = torch.cat([word, context], 1)
        hiddens, memories = [], []
        for layer, cell in enumerate(self.cells):
            below, memory = cell(below, (state.hidden[:, layer], state.cell[:, layer]))
            hiddens.append(below)
            memories.append(memory)
        state = state._replace(hidden=torch.stack(hiddens, 1), cell=torch.stack(memories, 1))
        return (below, context, weights), state
