"""Arguments that several commands take, each defined once."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from captionscale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from captionscale.config import Config

Subparsers: TypeAlias = "argparse._SubParsersAction[Any]"


class Commands:
    """The commands of one group."""

    def __init__(self, subparsers: Subparsers, parse: "Callable[[list[str]], argparse.Namespace]"):
        self.subparsers = subparsers
        self.parse = parse
        """Parses a whole command line."""
        self.summaries: dict[str, str] = {}

    def add(
        self, name: str, summary: str, handler: "Callable[[argparse.Namespace], None]", *, example: str
    ) -> argparse.ArgumentParser:
        """Add a command.

        Args:
            name: What the user types.
            summary: What it does, for both levels of help.
            handler: Runs it; gets the parsed options.
            example: A call, without `captionscale`, that its help ends with.
        """
        self.summaries[name] = summary
        parser = add_parser(self.subparsers, name, summary, example)
        parser.set_defaults(command_name=name, handler=handler)
        return parser


def add_parser(
    subparsers: Subparsers, name: str, summary: str, example: str, **options: Any
) -> argparse.ArgumentParser:
    """Add a parser whose help ends with an example."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  captionscale {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    return parser


def positive(text: str) -> int:
    """Read a number of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


def argument(*names: str, **settings: Any) -> "Callable[[argparse.ArgumentParser], None]":
    """Return a function that adds an argument to a parser."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(*names, **settings)

    return add


add_json = argument("--json", action="store_true", help="print the result as JSON")
add_checkpoint = argument("--checkpoint", default="best", help="best, last or a step (default: %(default)s)")
add_shards = argument(
    "--shards", metavar="DIR", help="folder or URL of other shards than those of the run's config"
)
add_ensemble = argument(
    "--ensemble",
    action="append",
    default=[],
    type=Path,
    metavar="RUN",
    dest="others",
    help="add this run to an ensemble with the first (same vocabulary required); repeatable",
)


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add CONFIG and --set, which `load_config` reads."""
    nargs = None if required else "?"
    parser.add_argument("config", metavar="CONFIG", nargs=nargs, help="a TOML file, or a name in configs/")
    _add_set(parser, "section.key=value")


def load_config(options: argparse.Namespace) -> "Config":
    """Return the experiment that CONFIG and --set name."""
    from captionscale import toml

    return toml.load(options.config, options.overrides)


def add_run(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add RUN; `require_run` is called before anything heavy is imported."""
    nargs = None if required else "?"
    parser.add_argument("run", type=Path, nargs=nargs, metavar="RUN", help="folder of the run")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add IMAGE ..., and --split, which replaces it."""
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--split", help="instead of image files: a split of the run's shards")


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add --beam and --set, which `search_overrides` reads, and --checkpoint."""
    parser.add_argument("--beam", type=positive, metavar="N", help="beam size (default: the run's config)")
    _add_set(parser, "search.key=value")
    add_checkpoint(parser)


def search_overrides(options: argparse.Namespace) -> list[str]:
    """Return --set and --beam as overrides of the config."""
    return [*options.overrides, *([f"search.beam={options.beam}"] if options.beam else [])]


def add_profile(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add --profile, the launch profile."""
    text = f"launch profile: a file, or a name in launch/ (default: {default or 'one process'})"
    parser.add_argument("--profile", default=default, help=text)


def add_job_size(parser: argparse.ArgumentParser, nodes: int | None) -> None:
    """Add --nodes, --gpus and --time."""
    text = "nodes (default: this job's, or 1)"
    parser.add_argument("--nodes", type=positive, default=nodes, metavar="N", help=text)
    parser.add_argument("--gpus", type=positive, metavar="N", help="GPUs of each node")
    parser.add_argument("--time", metavar="H:MM:SS", help="time limit of the job, such as 4:00:00")


def require_images_or_split(options: argparse.Namespace, usage: str) -> None:
    """Check that image files or a split is given, and not both.

    Raises:
        UserError: None of them, or both.
    """
    if bool(options.images) == bool(options.split):
        raise UserError(f"{options.command_name}: expected either {usage}")


def _add_set(parser: argparse.ArgumentParser, metavar: str) -> None:
    text = "change a key of the config; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar=metavar, dest="overrides", help=text)
