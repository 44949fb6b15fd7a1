"""What several verbs take."""

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from captionscale.config import Config

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""To which each room of verbs adds its own."""


def positive(text: str) -> int:
    """Read a number of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted at least 1")
    return number


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add CONFIG and --set, which `settings` reads."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs=None if required else "?", help="a path, or a name in configs/"
    )
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="changes")


def settings(options: argparse.Namespace) -> "Config":
    """Return the experiment that CONFIG and --set name."""
    from captionscale import toml

    return toml.load(options.config, options.changes)
