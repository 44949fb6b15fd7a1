"""The captioner: an encoder and a decoder."""

from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from captionscale import config
from captionscale.model.decoders.registry import DECODERS
from captionscale.model.decoders.scheduled_sampling import rehearse
from captionscale.model.encoders import weights
from captionscale.model.encoders.cnn import Encoder


class Captioner(nn.Module):
    """Reads pictures, writes captions."""

    def __init__(self, settings: config.Model, words: int):
        """Build a captioner with random weights.

        Args:
            settings: The config's section `model`.
            words: Size of the vocabulary.

        Raises:
            UserError: An unknown encoder.
        """
        super().__init__()
        self.encoder = Encoder(settings.encoder)
        build = DECODERS[settings.decoder.name]
        self.decoder = build(settings.decoder, self.encoder.feature_size, words)

    def load_pretrained(self) -> None:
        """Give the encoder the weights that its settings name.

        Raises:
            UserError: They cannot be had, or belong to another network.
        """
        settings = self.encoder.settings
        weights.load_into(self.encoder.trunk, settings.name, settings.weights)

    def look(
        self, pictures: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"]
    ) -> Float[Tensor, "image region feature"]:
        """Return the features of pictures; where they come from a cache, they are these."""
        features: Tensor = pictures if pictures.is_floating_point() else self.encoder(pictures)
        return features.float()

    def forward(
        self,
        pictures: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"],
        tokens: Int[Tensor, "caption time"],
        owners: Int[Tensor, "caption"],
        own_share: float = 0.0,
        rows: Int[Tensor, "row"] | None = None,
    ) -> tuple[
        Float[Tensor, "caption time word"] | Float[Tensor, "row word"],
        Float[Tensor, "caption time region"] | None,
    ]:
        """Return the logits of each caption's next words, and where the decoder looked for them.

        Args:
            pictures: Each encoded once, however many captions it has; or their features.
            tokens: Start and words; what each time reads, not what it predicts.
            owners: The row of `pictures` that each caption belongs to.
            own_share: Share of the words read that are the decoder's own predictions.
            rows: Only the logits of these words, counted caption after caption; without them, of all.
        """
        features = self.look(pictures)
        if own_share:
            logits, attention = rehearse(self.decoder, features, tokens, owners, own_share)
            return logits if rows is None else logits.flatten(0, 1)[rows], attention
        logits, attention = self.decoder(features, tokens, owners, rows)
        return logits, attention
