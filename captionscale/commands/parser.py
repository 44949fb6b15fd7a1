"""The command line as a whole."""

import argparse

from captionscale.commands import (
    leaderboards,
    monitoring,
    reporting,
    scoring,
    shards,
    sharing,
    training,
)
from captionscale.version import __version__


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.

    It reads the name of a command into `command_name`, and into `handler` what does it, a function of all that was said.
    """
    parser = argparse.ArgumentParser(
        "captionscale",
        description="Train image captioners on any number of GPUs, and score them like the leaderboards.",
    )
    parser.add_argument("--version", action="version", version=f"captionscale {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (shards, training, monitoring, scoring, reporting, leaderboards, sharing):
        group.add(subparsers)
    return parser
