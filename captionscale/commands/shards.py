"""`pack`, `verify`, `show` and `stats`: write and read shards."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from captionscale.commands.arguments import Commands, add_json, add_parser, argument, positive
from captionscale.commands.unknown_options import CommandParser
from captionscale.data.sources.registry import SOURCES
from captionscale.errors import UserError, first_few
from captionscale.escape import for_terminal
from captionscale.plugins import is_plugin

if TYPE_CHECKING:
    from captionscale.data.storage import Storage


class _SourceParser(CommandParser):
    """Adds a source's arguments when they are needed, so that other commands import no source."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self._add_arguments()
        return super().parse_known_args(args, namespace)

    def _add_arguments(self) -> None:
        from captionscale.data.sources import source

        if "--out" in self._option_string_actions:
            return
        try:
            source.load(self.get_default("source")).add_arguments(self)
        except UserError as error:
            self.exit(2, f"{self.prog}: error: {error}\n")
        _add_packing(self)


def add(commands: Commands) -> None:
    """Add them to the command line."""
    pack = commands.add(
        "pack",
        "write a data set as shards",
        _pack,
        example="pack table --images photos --captions mine.csv --out data/mine",
    )
    sources = pack.add_subparsers(
        required=True, metavar="SOURCE", help="one of these, or module:Class", parser_class=_SourceParser
    )
    for name, (_, text, arguments) in SOURCES.items():
        example = f"pack {name} {arguments} --out shards"
        add_parser(sources, name, f"pack {text}", example, help=text).set_defaults(source=name)

    words: list[str] = []

    def add_plugin(text: str) -> str:
        # argparse converts each word, the first one before it looks for that among the choices.
        if not words and is_plugin(text):
            sources.add_parser(text).set_defaults(source=text)
        words.append(text)
        return text

    sources.type = add_plugin

    verify = commands.add(
        "verify",
        "compare shards with their checksums, and look for images that are in two splits",
        _verify,
        example="verify data/coco --deep",
    )
    _add_shards(verify)
    verify.add_argument("--deep", action="store_true", help="decode every image too")
    verify.add_argument(
        "--allow-leaks", action="store_true", help="the same image in two splits is a note, no problem"
    )
    _add_workers(verify)
    add_json(verify)

    show = commands.add(
        "show", "print one sample of the shards", _show, example="show data/coco 391895 --out image.jpg"
    )
    _add_shards(show)
    show.add_argument("image_id", type=int, metavar="ID", help="image id")
    show.add_argument("--out", type=Path, metavar="FILE", help="write the stored image there")
    add_json(show)

    stats = commands.add(
        "stats", "count images, captions and words of the shards", _stats, example="stats data/coco"
    )
    _add_shards(stats)
    stats.add_argument(
        "--min-count", type=positive, default=5, metavar="N", help="as data.min_count (default: 5)"
    )
    stats.add_argument("--out", type=Path, metavar="FILE", help="also draw them: a .png, .pdf or .svg")
    add_json(stats)


_add_shards = argument("shards", metavar="SHARDS", help="folder or URL of the shards")
_add_workers = argument("--workers", type=positive, metavar="N", help="workers (default: one for each core)")


def _add_packing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the shards; it may hold other splits",
    )
    text = "images in each shard (default: %(default)s)"
    add("--images-per-shard", type=positive, default=1000, metavar="N", help=text)
    text = "shrink images to this shorter side (default: original size)"
    add("--resize", type=positive, metavar="PIXELS", help=text)
    text = "JPEG quality of shrunk images (default: 95)"
    add("--quality", type=int, choices=range(1, 101), metavar="1..100", help=text)
    text = "check only the images' headers: faster, but damage is found later"
    add("--no-decode", action="store_true", help=text)
    text = "largest fraction of unreadable images (default: %(default)s)"
    add("--max-rejected", type=_fraction, default=0.001, metavar="FRACTION", help=text)
    text = "fail if a split has another number of images; repeatable"
    add("--expect", type=_expected, action="append", default=[], metavar="SPLIT=IMAGES", help=text)
    _add_workers(parser)


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 1, such as 0.001")
    return fraction


def _expected(text: str) -> tuple[str, int]:
    split, _, images = text.partition("=")
    if not split or not images.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a split and its images, such as train=113287")
    return split, int(images)


def _pack(options: argparse.Namespace) -> None:
    from captionscale.tools.pack import pack

    pack(options)


def _verify(options: argparse.Namespace) -> None:
    from captionscale.data.storage import open_storage

    with tempfile.TemporaryDirectory(prefix="captionscale-") as fresh:
        # A fresh cache: what the URL serves now is verified, not an earlier download.
        _verify_place(open_storage(options.shards, Path(fresh)), options)


def _verify_place(place: "Storage", options: argparse.Namespace) -> None:
    from captionscale.data.storage import read_manifest
    from captionscale.data.verification import verify
    from captionscale.machine import cpu_count
    from captionscale.progress import progress, say

    images = {name: info.images for name, info in read_manifest(place).splits.items()}
    workers = options.workers or cpu_count()
    with progress("verifying", sum(images.values())) as bar:
        found = verify(
            place, deep=options.deep, allow_leaks=options.allow_leaks, workers=workers, progress=bar.advance
        )
    lines = []
    if options.json:
        print(json.dumps({"shards": options.shards, "images": images, **asdict(found)}, indent=1))
    else:
        for note in first_few(found.notes, "--json"):
            say(f"note: {note}")
        lines = first_few(found.problems, "--json")
    if found.problems:
        raise UserError(*lines, f"{options.shards}: NOT as packed; problems: {len(found.problems):,}")
    if not options.json:
        counts = ", ".join(f"{name} {count:,}" for name, count in images.items())
        print(f"{options.shards}: as packed: images: {counts}")


def _show(options: argparse.Namespace) -> None:
    from captionscale.data import decode, shards
    from captionscale.data.storage import open_storage
    from captionscale.files import atomic_write

    split, item = shards.find_image(open_storage(options.shards), options.image_id)
    data = split.image(item)
    info = decode.image_info(data, f"image {options.image_id}", full_decode=True)
    sample = split.sample(item)
    if options.json:
        facts = {"width": info.width, "height": info.height, "bytes": len(data), "format": info.extension}
        tree = {"id": options.image_id, "file": sample.file, "split": split.name, **facts}
        print(json.dumps({**tree, "captions": list(sample.captions)}, indent=1))
    else:
        print(f"image {options.image_id}  {for_terminal(sample.file)}  split {split.name}")
        print(f"{info.width} x {info.height} pixels, {len(data):,} bytes of {info.extension}")
        for caption in sample.captions:
            print(f"  {for_terminal(caption)}")
    if options.out:
        with atomic_write(options.out) as file:
            file.write(data)


def _stats(options: argparse.Namespace) -> None:
    from captionscale.data.storage import open_storage
    from captionscale.tools.dataset_stats import print_stats

    storage = open_storage(options.shards)
    print_stats(storage, min_count=options.min_count, plot=options.out, as_json=options.json)
