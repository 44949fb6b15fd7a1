"""The captioner: an encoder and a decoder."""

from collections.abc import Sequence

from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from captionscale.config_model import Model
from captionscale.model.decoders.decoder import Decoder, decoder_class, scheduled_sampling
from captionscale.model.encoders.encoder import Encoder, encoder_class


class Captioner(nn.Module):
    """Image captioning model."""

    def __init__(self, config: Model, vocab_size: int):
        """Build a captioner with random weights.

        Raises:
            UserError: An unknown encoder, or a plug-in that is none.
        """
        super().__init__()
        self.encoder: Encoder = encoder_class(config.encoder.name)(config.encoder)
        kind = decoder_class(config.decoder.name)
        self.decoder: Decoder = kind(config.decoder, self.encoder.feature_size, vocab_size)

    def encode(
        self, images: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"]
    ) -> Float[Tensor, "image region feature"]:
        """Return the features of images; cached features are returned as they are."""
        features: Tensor = images if images.is_floating_point() else self.encoder(images)
        return features.float()

    def forward(
        self,
        images: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"],
        tokens: Int[Tensor, "caption time"],
        lengths: Sequence[int],
        image_index: Int[Tensor, "caption"],
        sampling_prob: float = 0.0,
    ) -> tuple[Float[Tensor, "token word"], Float[Tensor, "caption time region"] | None]:
        """Return logits and attention weights as `Decoder.teacher_forced` does, of images or their features.

        With `sampling_prob`, the probability of reading the decoder's own sample, as `scheduled_sampling`.
        """
        features = self.encode(images)
        if sampling_prob:
            return scheduled_sampling(self.decoder, features, tokens, lengths, image_index, sampling_prob)
        return self.decoder.teacher_forced(features, tokens, lengths, image_index)
