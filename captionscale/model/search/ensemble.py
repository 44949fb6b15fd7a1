"""Several captioners that write as one."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from captionscale.model.captioner import Captioner
from captionscale.model.decoders.registry import Decoder


class Ensemble(nn.Module):
    """Captioners of the same words and of the same size of images; for search, not for training."""

    def __init__(self, members: Sequence[Captioner]):
        super().__init__()
        # Registered, so that they move to a device and change their mode together.
        self._parts = nn.ModuleList(members)
        self._members = list(members)
        self.decoder = EnsembleDecoder([member.decoder for member in members])

    def encode(self, images: UInt8[Tensor, "image 3 height width"]) -> tuple[Float[Tensor, "image _ _"], ...]:
        """Return each member's features of the images."""
        return tuple(member.encode(images) for member in self._members)


class EnsembleDecoder:
    """Decoders whose next word has the mean of their probabilities.

    There is no attention: members may see other regions.
    """

    def __init__(self, members: Sequence[Decoder]):
        self._members = list(members)

    def start(self, features: tuple[Float[Tensor, "batch _ _"], ...]) -> tuple[Any, ...]:
        """Return the members' states before any word."""
        return tuple(member.start(each) for member, each in zip(self._members, features, strict=True))

    def step(
        self, tokens: Int[Tensor, "batch"], state: tuple[Any, ...]
    ) -> tuple[Float[Tensor, "batch word"], tuple[Any, ...], None]:
        """Read one word for each row.

        Returns:
            The logarithm of the mean of the members' probabilities, their states, and no attention.
        """
        steps = [member.step(tokens, each) for member, each in zip(self._members, state, strict=True)]
        log_probs = torch.stack([logits.float().log_softmax(1) for logits, _, _ in steps])
        mean = log_probs.logsumexp(0) - math.log(len(steps))
        return mean, tuple(each for _, each, _ in steps), None
