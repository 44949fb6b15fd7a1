"""Attention over the regions of an image."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from captionscale import config
from captionscale.model.decoders.state import ImageIndex


def build_region_projection(settings: config.Decoder, feature_size: int) -> tuple[nn.Module, int]:
    """Return what projects regions before they are looked at, if anything does, and the size they then have.

    Args:
        settings: The config's section `model.decoder`.
        feature_size: Size of a region's feature.
    """
    if settings.region_size == 0:
        return nn.Identity(), feature_size
    size = settings.region_size or settings.attention_size
    return nn.Linear(feature_size, size), size


class AdditiveAttention(nn.Module):
    """Look at every image region and return their weighted mean.

    With a_i the regions and h the state: e_i = w . tanh(K a_i + b + Q h), weights = softmax(e), and the
    context is the sum over i of weights_i a_i.

    Source:
        Bahdanau et al. 2015 (arXiv:1409.0473), as used for images by Xu et al. 2015,
        "Show, Attend and Tell" (arXiv:1502.03044), equations 4 to 6 and 13, and by Anderson et al. 2018
        (arXiv:1707.07998), equations 3 to 5, without b.
    """

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int):
        super().__init__()
        self.key = nn.Linear(feature_size, attention_size)
        self.query = nn.Linear(hidden_size, attention_size, bias=False)
        self.energy = nn.Linear(attention_size, 1, bias=False)

    def keys(self, features: Float[Tensor, "batch region feature"]) -> Float[Tensor, "batch region attend"]:
        """Return what the attention needs of the regions; the same for all words, so computed once."""
        keys: Tensor = self.key(features)
        return keys

    def forward(
        self,
        features: Float[Tensor, "batch region feature"],
        keys: Float[Tensor, "batch region attend"],
        hidden: Float[Tensor, "row hidden"],
        image_index: ImageIndex = (),
    ) -> tuple[Float[Tensor, "row feature"], Float[Tensor, "row region"]]:
        """Attend to the regions that matter for the next word.

        Args:
            features: Encoder grid cells, flattened row by row from the top left.
            keys: Of these features.
            hidden: State of the LSTM that looks.
            image_index: Whose features each row of it looks at; those of an image side by side, or it takes long.

        Returns:
            The context vector, and the attention weights: non-negative, summing to one.
        """
        query = self.query(hidden)
        if isinstance(image_index, Tensor):
            return self._share(features, keys, query, image_index)
        energies = self.energy(torch.tanh(keys + query.unsqueeze(1))).squeeze(2)
        weights = energies.softmax(1)
        return torch.bmm(weights.unsqueeze(1), features).squeeze(1), weights

    def _share(
        self,
        features: Float[Tensor, "batch region feature"],
        keys: Float[Tensor, "batch region attend"],
        query: Float[Tensor, "row attend"],
        image_index: Int[Tensor, "row"],
    ) -> tuple[Float[Tensor, "row feature"], Float[Tensor, "row region"]]:
        """Do the same without a copy of features or keys for each row."""
        images, counts = torch.unique_consecutive(image_index, return_counts=True)
        means, looks = [], []
        # New memory for each image would take longer than the sums that it is for.
        room = keys.new_empty(int(counts.max()), *keys.shape[1:])
        for image, part in zip(images.tolist(), torch.split(query, counts.tolist()), strict=True):
            sums = torch.add(keys[image], part.unsqueeze(1), out=room[: len(part)])
            energies = self.energy(sums.tanh_()).squeeze(2)
            looks.append(energies.softmax(1))
            means.append(looks[-1] @ features[image])
        return torch.cat(means), torch.cat(looks)
