"""Additive attention over the regions of an image."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from captionscale.config_model import AttendingConfig
from captionscale.model.decoders.decoder import select
from captionscale.model.decoders.recurrent import RecurrentDecoder

ImageIndex = Tensor | tuple[()]
"""Row of `regions` and `keys` for each row of a state; empty: they have a row for each."""


class AttendingDecoder(RecurrentDecoder):
    """Base class of decoders whose state has `regions`, their `keys` and an `image_index`."""

    config: AttendingConfig

    def build_regions(self) -> int:
        """Add the projection of regions and the attention, and return the size of a projected region."""
        size = self.config.region_size
        size = self.config.attention_size if size is None else size or self.feature_size
        projected = self.config.region_size != 0
        self.region_projection = nn.Linear(self.feature_size, size) if projected else nn.Identity()
        self.attention = AdditiveAttention(size, self.config.hidden_size, self.config.attention_size)
        return size

    def project(self, features: Float[Tensor, "image region feature"]) -> Float[Tensor, "image region size"]:
        """Return the regions that attention reads."""
        regions: Tensor = self.dropout(self.region_projection(features).relu())
        return regions

    def select(self, state: Any, rows: Int[Tensor, "selected"]) -> Any:
        """Return the state of these rows.

        On a CPU and without gradient, the rows of an image share its regions and keys. Beam search is then
        1.11 (7 x 7 regions) and 1.59 times (14 x 14) as fast as with copies (`benchmarks/decode.py`).
        """
        regions, keys = state.regions, state.keys
        chosen = select(state._replace(regions=(), keys=()), rows)
        image_index = rows if chosen.image_index == () else chosen.image_index
        if rows.is_cpu and not torch.is_grad_enabled():
            return chosen._replace(regions=regions, keys=keys, image_index=image_index)
        return chosen._replace(regions=regions[image_index], keys=keys[image_index], image_index=())


class AdditiveAttention(nn.Module):
    """Weighted mean of an image's regions.

    With a_i the regions and h the state: e_i = w . tanh(K a_i + b + Q h), weights = softmax(e), and the
    context is the sum over i of weights_i a_i.

    Source:
        Bahdanau et al. 2015 (arXiv:1409.0473), as used for images by Xu et al. 2015, "Show, Attend and Tell"
        (arXiv:1502.03044), equations 4 to 6 and 13, and, without b, by Anderson et al. 2018
        (arXiv:1707.07998), equations 3 to 5.
    """

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int):
        super().__init__()
        self.key = nn.Linear(feature_size, attention_size)
        self.query = nn.Linear(hidden_size, attention_size, bias=False)
        self.energy = nn.Linear(attention_size, 1, bias=False)

    def forward(
        self,
        regions: Float[Tensor, "batch region size"],
        keys: Float[Tensor, "batch region attention"],
        hidden: Float[Tensor, "row hidden"],
        image_index: ImageIndex = (),
    ) -> tuple[Float[Tensor, "row size"], Float[Tensor, "row region"]]:
        """Return the context vectors, and the attention weights: non-negative, summing to one.

        `keys` is `key(regions)`, computed once for all words; `image_index` is fast if rows of an image are
        adjacent.
        """
        query = self.query(hidden)
        if isinstance(image_index, Tensor):
            return self._forward_shared(regions, keys, query, image_index)
        energies = self.energy(torch.tanh(keys + query.unsqueeze(1))).squeeze(2)
        weights = energies.softmax(1)
        return torch.bmm(weights.unsqueeze(1), regions).squeeze(1), weights

    def _forward_shared(
        self,
        regions: Float[Tensor, "batch region size"],
        keys: Float[Tensor, "batch region attention"],
        query: Float[Tensor, "row attention"],
        image_index: Int[Tensor, "row"],
    ) -> tuple[Float[Tensor, "row size"], Float[Tensor, "row region"]]:
        """Compute the same without copying regions or keys for each row."""
        images, counts = torch.unique_consecutive(image_index, return_counts=True)
        contexts, weights = [], []
        # Allocating memory for each image would take longer than the sums.
        buffer = keys.new_empty(int(counts.max()), *keys.shape[1:])
        for image, queries in zip(images.tolist(), torch.split(query, counts.tolist()), strict=True):
            sums = torch.add(keys[image], queries.unsqueeze(1), out=buffer[: len(queries)])
            weights.append(self.energy(sums.tanh_()).squeeze(2).softmax(1))
            contexts.append(weights[-1] @ regions[image])
        return torch.cat(contexts), torch.cat(weights)
