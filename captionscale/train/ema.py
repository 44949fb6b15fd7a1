"""A moving average of the weights: often a better captioner than the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SOON = 10


class ModelEMA:
    """The exponential moving average of what changes in a model, in fp32.

    Each rank keeps one: all have the same weights after each step, and so the same average.

    Source:
        Polyak and Juditsky 1992; the slower start as TensorFlow's `ExponentialMovingAverage` has it, so that
        the random first weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Begin with the weights as they are.

        Args:
            model: Its parameters that learn or will learn, and its buffers that are numbers, are averaged.
            decay: What is left of the average in each step, 0 to 1.
        """
        self._decay = decay
        self._own = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.is_floating_point()
        }
        self._average = {name: tensor.detach().clone() for name, tensor in self._own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after a step into account.

        Args:
            step: From 0.
        """
        decay = min(self._decay, (1 + step) / (_SOON + step))
        own = [tensor.detach() for tensor in self._own.values()]
        torch._foreach_lerp_(list(self._average.values()), own, 1 - decay)

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Let the model have the average instead of its weights for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average under the names of the model's weights."""
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with an average that `state_dict` gave."""
        for name, tensor in self._average.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._own.items():
            kept = tensor.clone()
            tensor.copy_(self._average[name])
            self._average[name].copy_(kept)
