"""Show and Tell: a decoder without attention."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from captionscale.config_model import PlainConfig
from captionscale.model.decoders.recurrent import DropoutMasks, RecurrentDecoder


class PlainState(NamedTuple):
    """The LSTM's state."""

    hidden: Float[Tensor, "row layer hidden"]
    cell: Float[Tensor, "row layer hidden"]
    masks: DropoutMasks = ()


class PlainDecoder(RecurrentDecoder):
    """An LSTM that reads the image as its first word.

    With x the image's mean feature, y_t the words and E y_t their embeddings:

        h_0 = LSTM(W x)                              (10)
        h_t = LSTM(E y_t, h_{t-1})                   (11)
        p(y_{t+1}) = softmax(output(E y_t, h_t))     (12)

    `image_batch_norm` normalizes W x over the micro-batch, as a much-copied PyTorch tutorial does. Evaluation
    uses the running statistics (momentum 0.01), those of rank 0.

    Source:
        Vinyals et al. 2015, "Show and Tell" (arXiv:1411.4555), with its equation numbers. There the LSTM has
        one layer and the output reads its state only (`word_head = "linear"`).
    """

    Config = PlainConfig

    def __init__(self, config: PlainConfig, feature_size: int, vocab_size: int):
        super().__init__(config, feature_size, vocab_size)
        self.image_projection = nn.Linear(feature_size, config.embed_size)
        norm = nn.BatchNorm1d(config.embed_size, momentum=0.01) if config.image_batch_norm else None
        self.image_batch_norm = norm
        self.build_embedding()
        self.lstm = nn.LSTM(config.embed_size, config.hidden_size, config.num_layers, batch_first=True)
        self.build_head(None)

    def start(self, features: Float[Tensor, "image region feature"]) -> PlainState:
        """Return the state after reading the image."""
        _, (hidden, cell) = self.lstm(self._embed_image(features.mean(1)).unsqueeze(1))
        return PlainState(hidden.transpose(0, 1), cell.transpose(0, 1))

    def recur(
        self, word: Float[Tensor, "row embed"], state: PlainState
    ) -> tuple[tuple[Float[Tensor, "row hidden"], None, None], PlainState]:
        """Read one word embedding."""
        hiddens, state = self._read(word.unsqueeze(1), state)
        return (hiddens.squeeze(1), None, None), state

    def recur_all(
        self,
        words: Float[Tensor, "caption time embed"],
        lengths: Sequence[int],  # noqa: ARG002
        image_index: Int[Tensor, "caption"],
        state: PlainState,
    ) -> tuple[Float[Tensor, "caption time hidden"], None, None]:
        """Read all word embeddings."""
        return self._read(words, self.select(state, image_index))[0], None, None

    def _read(
        self, words: Float[Tensor, "row time embed"], state: PlainState
    ) -> tuple[Float[Tensor, "row time hidden"], PlainState]:
        memory = (state.hidden.transpose(0, 1).contiguous(), state.cell.transpose(0, 1).contiguous())
        hiddens, (hidden, cell) = self.lstm(words, memory)
        return hiddens, state._replace(hidden=hidden.transpose(0, 1), cell=cell.transpose(0, 1))

    def _embed_image(self, images: Float[Tensor, "image feature"]) -> Float[Tensor, "image embed"]:
        embedded: Tensor = self.image_projection(images)
        norm = self.image_batch_norm
        if norm is not None and norm.training and len(embedded) == 1:
            # One image has no variance: use the running statistics.
            return F.batch_norm(
                embedded, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        return embedded if norm is None else norm(embedded)
