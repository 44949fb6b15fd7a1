"""Base class and field types of the config's sections."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from captionscale import credentials, plugins
from captionscale.errors import did_you_mean

_LINE = r"^[^\x00-\x1f\x7f]*$"


def _one_line(path: Path) -> Path:
    if not re.fullmatch(_LINE, str(path)):
        raise PydanticCustomError("one_line", "Path should have no control characters")
    return path


# Bounds are far above any experiment: a config from anywhere is not to take the machine's memory.
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Count = Annotated[int, Field(ge=1, le=10**9)]
"""A whole number from 1 on."""
SmallCount = Annotated[int, Field(ge=1, le=1000)]
"""A whole number of things that take memory each."""
Size = Annotated[int, Field(ge=1, le=2**14)]
"""Size of a vector."""
Step = Annotated[int, Field(ge=0, le=10**9)]
"""A whole number from 0 on."""
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A number above 0."""
Weight = Annotated[float, Field(ge=0, le=10**6)]
"""What a part of a sum is multiplied by."""
Text = Annotated[str, Field(pattern=_LINE, max_length=4096)]
"""A line without control characters."""
PlainPath = Annotated[Path, AfterValidator(_one_line)]
"""A path without control characters."""


def name_or_plugin(names: Collection[str]) -> AfterValidator:
    """Return the check of a text: one of these names, or `module:Class`."""

    def check(name: str) -> str:
        if name not in names and not plugins.is_plugin(name):
            hint = did_you_mean(name, names)
            expected = f"{', '.join(map(repr, names))} or module:Class" + f"; {hint}" * hint.endswith("?")
            raise PydanticKnownError("literal_error", {"expected": expected})
        return name

    return AfterValidator(check)


class Section(BaseModel):
    """A part of the tree: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "type[Section]":  # noqa: ARG003
        """Return the class that validates a tree of this section."""
        return cls

    @model_validator(mode="before")
    @classmethod
    def _without_credentials(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {
            key: credentials.strip_and_remember(value) if isinstance(value, str) else value
            for key, value in tree.items()
        }
