"""Ensembles of captioners."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from captionscale.model.captioner import Captioner
from captionscale.model.decoders.decoder import StepDecoder


class Ensemble(nn.Module):
    """Captioners of one vocabulary and image size; for search, not for training."""

    def __init__(self, members: Sequence[Captioner]):
        super().__init__()
        # Registered, so that they move and change mode together.
        self._parts = nn.ModuleList(members)
        self._members = list(members)
        self.decoder = EnsembleDecoder([member.decoder for member in members])

    def encode(self, images: UInt8[Tensor, "image 3 height width"]) -> tuple[Float[Tensor, "image _ _"], ...]:
        """Return each member's features of the images."""
        return tuple(member.encode(images) for member in self._members)


class EnsembleDecoder:
    """Decoders that average their probabilities; without attention, as members may see other regions."""

    def __init__(self, members: Sequence[StepDecoder]):
        self._members = list(members)

    def start(self, features: tuple[Float[Tensor, "batch _ _"], ...]) -> tuple[Any, ...]:
        """Return the members' states before the first word."""
        return tuple(member.start(each) for member, each in zip(self._members, features, strict=True))

    def step(
        self, tokens: Int[Tensor, "batch"], state: tuple[Any, ...]
    ) -> tuple[Float[Tensor, "batch word"], tuple[Any, ...], None]:
        """Read one token per row: the log of the mean probability, the members' states, and None."""
        steps = [member.step(tokens, each) for member, each in zip(self._members, state, strict=True)]
        log_probs = torch.stack([logits.float().log_softmax(1) for logits, _, _ in steps])
        mean = log_probs.logsumexp(0) - math.log(len(steps))
        return mean, tuple(each for _, each, _ in steps), None

    def select(self, state: tuple[Any, ...], rows: Int[Tensor, "selected"]) -> tuple[Any, ...]:
        """Return the members' states of these rows."""
        return tuple(member.select(each, rows) for member, each in zip(self._members, state, strict=True))
