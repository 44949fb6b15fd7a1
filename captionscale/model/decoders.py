"""The recurrent networks that write captions.

Decoders share two functions: `start(features) -> state` and `step(tokens, state) -> (logits, state,
attention)`. Every tensor of a state has the batch as its first dimension, so `select` can reorder it.
Training uses `forward`, which knows all words beforehand and keeps out of the recurrence what it can.
"""

from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from captionscale import config
from captionscale.model.attention import AdditiveAttention
from captionscale.vocab import PAD

Features = Float[Tensor, "image region feature"]
Tokens = Int[Tensor, "caption time"]
Owners = Int[Tensor, "caption"]
Logits = Float[Tensor, "caption time word"]
Weights = Float[Tensor, "caption time region"]


class PlainState(NamedTuple):
    """The LSTM's memory."""

    hidden: Float[Tensor, "batch layer hidden"]
    cell: Float[Tensor, "batch layer hidden"]


class AttentionState(NamedTuple):
    """The picture and the LSTM's memory."""

    regions: Float[Tensor, "batch region attend"]
    keys: Float[Tensor, "batch region attend"]
    hidden: Float[Tensor, "batch layer hidden"]
    cell: Float[Tensor, "batch layer hidden"]


State = TypeVar("State", bound=PlainState | AttentionState)


def select(state: State, rows: Int[Tensor, "rows"]) -> State:
    """Return the state of these rows of the batch, in this order; a row may come twice."""
    return type(state)(*(tensor[rows] for tensor in state))


class PlainDecoder(nn.Module):
    """Tell what was seen once: the picture is the first word of the sentence.

    With x the picture's mean feature and y_t the words: h_0 = LSTM(W x), h_t = LSTM(E y_t, h_{t-1}),
    p(y_{t+1}) = softmax(V h_t).

    Source:
        Vinyals et al. 2015, "Show and Tell" (arXiv:1411.4555), equations 10 to 12.
    """

    def __init__(self, settings: config.Decoder, feature: int, words: int):
        super().__init__()
        self.picture = nn.Linear(feature, settings.embed)
        self.embedding = nn.Embedding(words, settings.embed, padding_idx=PAD)
        self.dropout = nn.Dropout(settings.dropout)
        self.lstm = nn.LSTM(settings.embed, settings.hidden, settings.layers, batch_first=True)
        self.vocabulary = nn.Linear(settings.hidden, words)

    def start(self, features: Float[Tensor, "batch region feature"]) -> PlainState:
        """Return the state after seeing the picture, before any word."""
        _, (hidden, cell) = self.lstm(self.picture(features.mean(1)).unsqueeze(1))
        return PlainState(hidden.transpose(0, 1), cell.transpose(0, 1))

    def step(
        self, tokens: Int[Tensor, "batch"], state: PlainState
    ) -> tuple[Float[Tensor, "batch word"], PlainState, None]:
        """Read one word for each row and return the logits of the next; no attention."""
        logits, state = self._read(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state, None

    def forward(self, features: Features, tokens: Tokens, owners: Owners) -> tuple[Logits, None]:
        """Return the logits of each word that follows; no attention."""
        logits, _ = self._read(tokens, select(self.start(features), owners))
        return logits, None

    def _read(self, tokens: Tokens, state: PlainState) -> tuple[Logits, PlainState]:
        hidden, cell = (memory.transpose(0, 1).contiguous() for memory in state)
        outputs, (hidden, cell) = self.lstm(self.dropout(self.embedding(tokens)), (hidden, cell))
        logits = self.vocabulary(self.dropout(outputs))
        return logits, PlainState(hidden.transpose(0, 1), cell.transpose(0, 1))


class AttentionDecoder(nn.Module):
    """Look at regions of the picture for each word.

    With a = relu(A regions), y the words and h the last layer's state: z_t = attention(a, h_{t-1}),
    h_t = LSTM([E y_t, z_t], h_{t-1}), p(y_{t+1}) = softmax(V dropout(E y_t + H h_t + Z z_t)); further layers
    read the layer below. The first states are read from the mean of a by a layer with tanh.

    Source:
        Xu et al. 2015, "Show, Attend and Tell" (arXiv:1502.03044), soft attention, equations 1 to 7 and the
        deep output of section 3.1.2. We leave out the gating scalar and the doubly stochastic penalty, stack
        LSTM layers, and attend to projected regions, as Rennie et al. 2017 do (arXiv:1612.00563): the
        recurrence then costs a quarter on ResNet-50's 2,048 features.
    """

    def __init__(self, settings: config.Decoder, feature: int, words: int):
        super().__init__()
        embed, hidden, layers = settings.embed, settings.hidden, settings.layers
        self.embedding = nn.Embedding(words, embed, padding_idx=PAD)
        self.dropout = nn.Dropout(settings.dropout)
        self.regions = nn.Linear(feature, settings.attend)
        self.attention = AdditiveAttention(settings.attend, hidden, settings.attend)
        self.first_states = nn.Linear(settings.attend, 2 * layers * hidden)
        inputs = [embed + settings.attend] + [hidden] * (layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(size, hidden) for size in inputs)
        self.from_hidden = nn.Linear(hidden, embed)
        self.from_context = nn.Linear(settings.attend, embed, bias=False)
        self.vocabulary = nn.Linear(embed, words)

    def start(self, features: Float[Tensor, "batch region feature"]) -> AttentionState:
        """Return the state before any word."""
        regions = self.dropout(self.regions(features).relu())
        memories = torch.tanh(self.first_states(regions.mean(1))).view(len(regions), 2, len(self.cells), -1)
        return AttentionState(regions, self.attention.keys(regions), memories[:, 0], memories[:, 1])

    def step(
        self, tokens: Int[Tensor, "batch"], state: AttentionState
    ) -> tuple[Float[Tensor, "batch word"], AttentionState, Float[Tensor, "batch region"]]:
        """Read one word for each row.

        Returns:
            The logits of the next word, the state after this one, and where the decoder looked.
        """
        embedded = self.dropout(self.embedding(tokens))
        context, weights, state = self._recur(embedded, state)
        return self._output(embedded, state.hidden[:, -1], context), state, weights

    def forward(self, features: Features, tokens: Tokens, owners: Owners) -> tuple[Logits, Weights]:
        """Return the logits of each word that follows, and where the decoder looked for it."""
        embedded = self.dropout(self.embedding(tokens))
        state = select(self.start(features), owners)
        hiddens, contexts, looks = [], [], []
        for time in range(tokens.shape[1]):
            context, weights, state = self._recur(embedded[:, time], state)
            hiddens.append(state.hidden[:, -1])
            contexts.append(context)
            looks.append(weights)
        logits = self._output(embedded, torch.stack(hiddens, 1), torch.stack(contexts, 1))
        return logits, torch.stack(looks, 1)

    def _recur(
        self, embedded: Float[Tensor, "batch embed"], state: AttentionState
    ) -> tuple[Float[Tensor, "batch attend"], Float[Tensor, "batch region"], AttentionState]:
        context, weights = self.attention(state.regions, state.keys, state.hidden[:, -1])
        below = torch.cat([embedded, context], 1)
        hiddens, memories = [], []
        for layer, cell in enumerate(self.cells):
            below, memory = cell(below, (state.hidden[:, layer], state.cell[:, layer]))
            hiddens.append(below)
            memories.append(memory)
        state = state._replace(hidden=torch.stack(hiddens, 1), cell=torch.stack(memories, 1))
        return context, weights, state

    def _output(
        self,
        embedded: Float[Tensor, "*batch embed"],
        hidden: Float[Tensor, "*batch hidden"],
        context: Float[Tensor, "*batch attend"],
    ) -> Float[Tensor, "*batch word"]:
        deep = embedded + self.from_hidden(hidden) + self.from_context(context)
        logits: Tensor = self.vocabulary(self.dropout(deep))
        return logits


DECODERS: dict[str, type[PlainDecoder | AttentionDecoder]] = {
    "plain": PlainDecoder,
    "attention": AttentionDecoder,
}
