"""The captioner: an encoder and a decoder."""

from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from captionscale import config
from captionscale.model.decoders.registry import DECODERS
from captionscale.model.decoders.scheduled_sampling import scheduled_sampling_forward
from captionscale.model.encoders import weights
from captionscale.model.encoders.cnn import Encoder


class Captioner(nn.Module):
    """Reads images, writes captions."""

    def __init__(self, settings: config.Model, vocab_size: int):
        """Build a captioner with random weights.

        Args:
            settings: The config's section `model`.
            vocab_size: Size of the vocabulary.

        Raises:
            UserError: An unknown encoder.
        """
        super().__init__()
        self.encoder = Encoder(settings.encoder)
        build = DECODERS[settings.decoder.name]
        self.decoder = build(settings.decoder, self.encoder.feature_size, vocab_size)

    def load_pretrained(self) -> None:
        """Give the encoder the weights that its settings name.

        Raises:
            UserError: They cannot be had, or belong to another network.
        """
        settings = self.encoder.settings
        weights.load_into(self.encoder.backbone, settings.name, settings.weights)

    def encode(
        self, images: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"]
    ) -> Float[Tensor, "image region feature"]:
        """Return the features of images; where they come from a cache, they are these."""
        features: Tensor = images if images.is_floating_point() else self.encoder(images)
        return features.float()

    def forward(
        self,
        images: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"],
        tokens: Int[Tensor, "caption time"],
        image_index: Int[Tensor, "caption"],
        sampling_prob: float = 0.0,
        rows: Int[Tensor, "row"] | None = None,
    ) -> tuple[
        Float[Tensor, "caption time word"] | Float[Tensor, "row word"],
        Float[Tensor, "caption time region"] | None,
    ]:
        """Return the logits of each caption's next words, and where the decoder looked for them.

        Args:
            images: Each encoded once, however many captions it has; or their features.
            tokens: Start and words; what each time reads, not what it predicts.
            image_index: The row of `images` that each caption belongs to.
            sampling_prob: Share of the words read that are the decoder's own predictions.
            rows: Only the logits of these words, counted caption after caption; without them, of all.
        """
        features = self.encode(images)
        if sampling_prob:
            logits, attention = scheduled_sampling_forward(
                self.decoder, features, tokens, image_index, sampling_prob
            )
            return logits if rows is None else logits.flatten(0, 1)[rows], attention
        logits, attention = self.decoder.teacher_forced(features, tokens, image_index, rows)
        return logits, attention
