"""Load a user's own class, named `module:Class`."""

import importlib
from typing import TypeVar

from captionscale.errors import UserError

T = TypeVar("T")


def is_plugin(name: str) -> bool:
    """Return whether a name is `module:Class`, and not one of captionscale's own."""
    return ":" in name


def load(name: str, base: type[T], expected: str | None = None) -> type[T]:
    """Import a class from Python's path.

    The current folder is not added to it: a checkpoint's config may name a class, and its author must not
    choose what is executed. `expected` is the name of the base class in errors, where it is not `base`'s.

    Raises:
        UserError: No such module or class, an error while it is imported, or a class that is no `base`.
    """
    module, _, attribute = name.partition(":")
    expected = expected or f"{base.__module__}.{base.__name__}"
    cure = (
        "expected MODULE:CLASS on Python's path (PYTHONPATH=. adds the current folder), derived from"
        f" {expected}; see docs/extending.md"
    )
    try:
        found = getattr(importlib.import_module(module), attribute)
    # A module of the user's may raise anything.
    except Exception as error:
        raise UserError(f"{name}: cannot be imported ({type(error).__name__}: {error}); {cure}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{name}: found {found!r:.60}; {cure}")
    return found
