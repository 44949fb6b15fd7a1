"""What a decoder remembers between two words: nested tuples of tensors, with the batch first."""

from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

State = TypeVar("State", bound=tuple[Any, ...])

ImageIndex: TypeAlias = Tensor | tuple[()]
"""Where the image of each row is in those fields of a state that are `PER_IMAGE_FIELDS`. Empty: a row, an image."""

PER_IMAGE_FIELDS = ("regions", "keys")
"""Fields that a state with `image_index` has of each image, not of each row: what attention looks at."""


def select(state: State, rows: Int[Tensor, "rows"]) -> State:
    """Return the state of these rows of the batch, in this order; a row may come twice.

    On a CPU, rows of an image share what attention looks at, instead of having copies; but not where a
    gradient is wanted, which would be gathered anew at each word.
    """
    fields = getattr(state, "_fields", ())
    shared = PER_IMAGE_FIELDS if "image_index" in fields else ()
    parts = [
        part if name in shared else select(part, rows) if isinstance(part, tuple) else part[rows]
        for name, part in zip(fields or range(len(state)), state, strict=True)
    ]
    # A NamedTuple takes its fields one by one.
    chosen: Any = type(state)(*parts) if fields else type(state)(parts)
    if shared:
        image_index = rows if chosen.image_index == () else chosen.image_index
        chosen = chosen._replace(image_index=image_index)
        if rows.device.type != "cpu" or torch.is_grad_enabled():
            copies = {name: getattr(state, name)[image_index] for name in shared}
            chosen = chosen._replace(**copies, image_index=())
    result: State = chosen
    return result
