"""What a decoder remembers between two words: nested tuples of tensors, all with the batch first."""

from typing import Any, TypeVar

from jaxtyping import Int
from torch import Tensor

State = TypeVar("State", bound=tuple[Any, ...])


def select(state: State, rows: Int[Tensor, "rows"]) -> State:
    """Return the state of these rows of the batch, in this order; a row may come twice."""
    parts = [select(part, rows) if isinstance(part, tuple) else part[rows] for part in state]
    # A NamedTuple takes its fields one by one.
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
