"""The decoder that is told once what was seen."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from captionscale import config
from captionscale.model.decoders import word_head
from captionscale.model.decoders.dropout import Dropout
from captionscale.model.decoders.state import select
from captionscale.model.decoders.word_head import DropoutMasks


class PlainState(NamedTuple):
    """The LSTM's memory."""

    hidden: Float[Tensor, "batch layer hidden"]
    cell: Float[Tensor, "batch layer hidden"]
    masks: DropoutMasks = ()


class PlainDecoder(nn.Module):
    """Tell what was seen once: the image is the first word of the sentence.

    With x the image's mean feature, y_t the words and E y_t their vectors:

        h_0 = LSTM(W x)                              (10)
        h_t = LSTM(E y_t, h_{t-1})                   (11)
        p(y_{t+1}) = softmax(output(E y_t, h_t))     (12)

    `image_batch_norm` normalises W x over the micro-batch, as a much-copied captioner of PyTorch tutorials does.
    Captioning takes a running mean and variance, which follow by 1 % at each micro-batch: those of rank 0.

    Source:
        Vinyals et al. 2015, "Show and Tell" (arXiv:1411.4555), with its equations' numbers. There the LSTM
        has one layer, and words are read from its state alone (`word_head = "linear"`).
    """

    def __init__(self, settings: config.Decoder, feature_size: int, vocab_size: int):
        """Build a decoder with random weights.

        Args:
            settings: The config's section `model.decoder`.
            feature_size: Size of a region's feature.
            vocab_size: Size of the vocabulary.
        """
        super().__init__()
        self.image_projection = nn.Linear(feature_size, settings.embed_size)
        self.image_batch_norm = (
            nn.BatchNorm1d(settings.embed_size, momentum=0.01) if settings.image_batch_norm else None
        )
        self.embedding = word_head.build_embedding(settings, vocab_size)
        self.dropout = Dropout(settings.dropout, settings.variational_dropout)
        self.lstm = nn.LSTM(settings.embed_size, settings.hidden_size, settings.num_layers, batch_first=True)
        layers = word_head.build_layers(settings, None, vocab_size)
        self.from_word, self.from_hidden, self.from_context, self.output_projection = layers

    def start(self, features: Float[Tensor, "batch region feature"]) -> PlainState:
        """Return the state after seeing the image, before any word."""
        _, (hidden, cell) = self.lstm(self._see(features.mean(1)).unsqueeze(1))
        return PlainState(hidden.transpose(0, 1), cell.transpose(0, 1))

    def step(
        self, tokens: Int[Tensor, "batch"], state: PlainState
    ) -> tuple[Float[Tensor, "batch word"], PlainState, None]:
        """Read one word for each row and return the logits of the next; no attention."""
        logits, state = self._read(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state, None

    def teacher_forced(
        self,
        features: Float[Tensor, "image region feature"],
        tokens: Int[Tensor, "caption time"],
        image_index: Int[Tensor, "caption"],
        rows: Int[Tensor, "row"] | None = None,
    ) -> tuple[Float[Tensor, "caption time word"] | Float[Tensor, "row word"], None]:
        """Return the logits of each word that follows, or of these rows; no attention."""
        logits, _ = self._read(tokens, select(self.start(features), image_index), rows)
        return logits, None

    def _see(self, images: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch embed"]:
        vectors: Tensor = self.image_projection(images)
        norm = self.image_batch_norm
        if norm is None:
            return vectors
        if not (self.training and vectors.shape[0] == 1):
            normal: Tensor = norm(vectors)
            return normal
        # One image has no variance: it is read as captioning does.
        return F.batch_norm(
            vectors, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )

    def _read(
        self,
        tokens: Int[Tensor, "caption time"],
        state: PlainState,
        rows: Int[Tensor, "row"] | None = None,
    ) -> tuple[Float[Tensor, "caption time word"] | Float[Tensor, "row word"], PlainState]:
        masks = state.masks or word_head.dropout_masks(self, tokens.shape[0])
        words = word_head.embed_tokens(self, tokens, masks)
        memory = (state.hidden.transpose(0, 1).contiguous(), state.cell.transpose(0, 1).contiguous())
        hiddens, (hidden, cell) = self.lstm(words, memory)
        logits = word_head.logits(self, words, hiddens, None, masks, rows)
        return logits, PlainState(hidden.transpose(0, 1), cell.transpose(0, 1), masks)
