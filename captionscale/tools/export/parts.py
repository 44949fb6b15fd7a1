"""A captioner as three programs: images to features, features to state, token and state to the next state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from captionscale.model.captioner import Captioner
from captionscale.model.decoders.decoder import select

NEXT_PREFIX = "next_"
"""Prefix of the name of a state tensor that a step changes."""

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""An exported program, from inputs to outputs in the part's order."""


@dataclass(frozen=True, eq=False)
class Part:
    """A program before its export; the first dimension of all inputs and outputs is the batch."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    """Example batch."""
    outputs: tuple[str, ...]


class _Program(nn.Module):
    """A function of the weights of a module, from a tuple of tensors to a tuple of tensors."""

    def __init__(self, module: nn.Module, function: Callable[..., tuple[Tensor, ...]]):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.function(*inputs)


@torch.no_grad()
def parts(captioner: Captioner, image_size: int, batch: int) -> list[Part]:
    """Return the encoder and the two functions of the decoder.

    Args:
        captioner: In evaluation mode, on the CPU.
        image_size: Side of the images, in pixels.
        batch: Size of the example batch.
    """
    decoder = captioner.decoder
    images = torch.randint(256, (batch, 3, image_size, image_size), dtype=torch.uint8)
    features = captioner.encode(images)
    state: Any = decoder.start(features)
    tokens = torch.ones(batch, dtype=torch.long)
    _, after, attention = decoder.step(tokens, state)
    names = [name for name, value in state._asdict().items() if isinstance(value, Tensor)]
    # Attention keys and values do not change.
    changing = [name for name in names if getattr(after, name) is not getattr(state, name)]
    # A tensor that occurs twice would become one input.
    tensors = {name: getattr(state, name).clone() for name in names}

    def encode(images: Tensor) -> tuple[Tensor, ...]:
        return (captioner.encode(images),)

    def start(features: Tensor) -> tuple[Tensor, ...]:
        state = decoder.start(features)
        return tuple(getattr(state, name) for name in names)

    def step(tokens: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        before = type(state)(**dict(zip(names, tensors, strict=True)))
        logits, after, attention = decoder.step(tokens, before)
        return (
            logits,
            *(() if attention is None else (attention,)),
            *(getattr(after, name) for name in changing),
        )

    outputs = (
        "logits",
        *(() if attention is None else ("attention",)),
        *(NEXT_PREFIX + it for it in changing),
    )
    return [
        Part("encoder", _Program(captioner, encode), {"images": images}, ("features",)),
        Part("start", _Program(decoder, start), {"features": features}, (*names,)),
        Part("step", _Program(decoder, step), {"tokens": tokens, **tensors}, outputs),
    ]


class ExportedCaptioner:
    """Exported programs with the interface that search uses: `encode`, `start`, `step` and `select`."""

    def __init__(self, parts: Sequence[Part], programs: dict[str, Run], batch: int | None):
        """Combine the programs of all parts, by name; `batch` is their fixed batch size, None: any."""
        self._programs, self._batch = programs, batch
        self._names, self._outputs = [*parts[-1].inputs][1:], parts[-1].outputs

    def encode(self, images: Tensor) -> Float[Tensor, "image region feature"]:
        """Return the features of images."""
        return self._run("encoder", [images])[0]

    def start(self, features: Float[Tensor, "image region feature"]) -> tuple[Tensor, ...]:
        """Return the state before any word."""
        return tuple(self._run("start", [features]))

    def step(
        self, tokens: Int[Tensor, "batch"], state: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "batch word"], tuple[Tensor, ...], None]:
        """Return the logits of the next word and the state after this one."""
        found = dict(zip(self._outputs, self._run("step", [tokens, *state]), strict=True))
        named = zip(self._names, state, strict=True)
        return found["logits"], tuple(found.get(NEXT_PREFIX + name, old) for name, old in named), None

    def select(self, state: tuple[Tensor, ...], rows: Int[Tensor, "selected"]) -> tuple[Tensor, ...]:
        """Return the state of these rows."""
        return select(state, rows)

    def _run(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        program, rows = self._programs[name], len(inputs[0])
        size = self._batch or rows
        batches = []
        for first in range(0, rows, size):
            # A fixed batch is filled up with the last row.
            chosen = torch.arange(first, first + size).clamp(max=rows - 1)
            batches.append(program([each[chosen] for each in inputs]))
        return [torch.cat(outputs)[:rows] for outputs in zip(*batches, strict=True)]
