"""What several commands take."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from captionscale.config import Config

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""To which each group of commands adds its own."""


def positive(text: str) -> int:
    """Read a number of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted at least 1")
    return number


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add CONFIG and --set, which `load_config` reads."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs=None if required else "?", help="a path, or a name in configs/"
    )
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="overrides")


def load_config(options: argparse.Namespace) -> "Config":
    """Return the experiment that CONFIG and --set name."""
    from captionscale import toml

    return toml.load(options.config, options.overrides)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add --beam and --set, which `search_overrides` reads, and --checkpoint."""
    parser.add_argument(
        "--beam", type=positive, help="captions kept at each word (default: the run's config)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="search.key=value",
        dest="overrides",
        help="another search than the run's config has; repeatable",
    )
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: %(default)s)")


def add_ensemble(parser: argparse.ArgumentParser) -> None:
    """Add --ensemble, the other runs of an ensemble."""
    parser.add_argument(
        "--ensemble",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        dest="others",
        help="let this run, of the same words, write together with the first; repeatable",
    )


def search_overrides(options: argparse.Namespace) -> list[str]:
    """Return what is asked of the search as --set has it."""
    return [*options.overrides, *([f"search.beam={options.beam}"] if options.beam else [])]
