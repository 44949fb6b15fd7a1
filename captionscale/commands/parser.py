"""The command line as a whole."""

import argparse

from captionscale.commands import leaderboards, monitoring, scoring, shards, sharing, training
from captionscale.commands.arguments import Commands
from captionscale.commands.unknown_options import CommandParser
from captionscale.version import __version__

_GROUPS = (
    ("data", (shards,)),
    ("training", (training, monitoring)),
    ("captions and scores", (scoring, leaderboards)),
    ("looking at a run, and sharing it", (sharing,)),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.

    It puts the name of a command into `command_name`, and the function that runs it into `handler`.
    """
    parser = CommandParser(
        "captionscale",
        usage="captionscale [-h] [--version] COMMAND ...",
        description="Train image captioners on any number of GPUs, and score them as the leaderboards do.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"captionscale {__version__}")
    subparsers = parser.add_subparsers(
        required=True, metavar="COMMAND", help=argparse.SUPPRESS, prog="captionscale"
    )
    lines = []
    for title, modules in _GROUPS:
        commands = Commands(subparsers, parser.parse_args)
        for module in modules:
            module.add(commands)
        lines += [f"{title}:", *(f"  {name:<13}{text}" for name, text in commands.summaries.items()), ""]
    parser.epilog = "\n".join([*lines, "captionscale COMMAND --help has the options and an example of each."])
    return parser
