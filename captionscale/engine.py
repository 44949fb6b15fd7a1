"""What moves a model: the engine that the launch profile names, behind one set of calls."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from captionscale.ranks import Ranks

T = TypeVar("T")

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """A model and its AdamW, as the ranks move them together."""

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: Optimizer, clip_norm: float):
        """Hand a model over; the model itself stays what is read, saved and scored.

        Args:
            ranks: Among which gradients are averaged.
            model: On the ranks' device, the same on all of them.
            optimizer: AdamW over what learns.
            clip_norm: Greatest norm of a step's gradient.
        """
        self._ranks, self._module, self._clip_norm = ranks, model, clip_norm
        self._accelerator = ranks.accelerator
        self._adam = optimizer
        with warnings.catch_warnings():
            # Newer torch wants another word for it, which older torch and Accelerate do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        ranks.share_buffers(model)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's, whose `lr` may be set."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def __call__(self, *inputs: Any) -> Any:
        """Return the model's outputs."""
        return self._model(*inputs)

    def last_one_syncs(self, work: Iterable[T]) -> Iterator[T]:
        """Yield this rank's micro-batches; gradients travel between ranks only in the last one's backward."""
        items = list(work)
        for number, item in enumerate(items, start=1):
            context = nullcontext() if number == len(items) else self._accelerator.no_sync(self._model)
            with context:
                yield item

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, scaled as the precision needs."""
        self._accelerator.backward(loss)

    def update(self) -> Tensor:
        """Clip the gradient, take the step, and return what the gradient's norm was."""
        norm: Tensor = self._accelerator.clip_grad_norm_(self._module.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def memory(self) -> dict[str, Tensor]:
        """Return AdamW's memory under the names of the parameters, so that any engine finds it again.

        All ranks call it; what rank 0 gets is whole.
        """
        return {
            f"{name}/{key}": torch.as_tensor(self._adam.state[parameter][key])
            for name, parameter in self._module.named_parameters()
            if self._adam.state.get(parameter)
            for key in ("step", *_MOMENTS)
        }

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Set AdamW's memory to what `memory` gave, under this or another engine."""
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                # In the parameter's own memory format: the fused optimiser goes through both by address.
                moments = {
                    key: torch.empty_like(parameter).copy_(memory[f"{name}/{key}"]) for key in _MOMENTS
                }
                step = memory[f"{name}/step"].to(parameter.device)
                self._adam.state[parameter] = {"step": step, **moments}

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scaler's state; empty unless the precision is fp16."""
        scaler = self._accelerator.scaler
        return dict(scaler.state_dict()) if scaler is not None else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Set the loss scaler's state to one that `scaler_state` gave."""
        if state and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state)
