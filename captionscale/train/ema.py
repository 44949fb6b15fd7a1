"""Exponential moving average (EMA) of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_WARMUP = 10


class ModelEMA:
    """Exponential moving average of a model's weights, in fp32; the same on every rank.

    Source:
        Polyak and Juditsky 1992; with the warm-up of TensorFlow's `ExponentialMovingAverage`.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Begin with the floating-point parameters and buffers of the model."""
        self._decay, weights = decay, model.state_dict(keep_vars=True)
        self._weights = {name: each for name, each in weights.items() if each.is_floating_point()}
        self._average = {name: tensor.detach().clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step, from 0."""
        decay = min(self._decay, (1 + step) / (_WARMUP + step))
        weights = [tensor.detach() for tensor in self._weights.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Swap the average into the model."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by names of the model's weights."""
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        for name, tensor in self._average.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._weights.items():
            kept = tensor.clone()
            tensor.copy_(self._average[name])
            self._average[name].copy_(kept)
