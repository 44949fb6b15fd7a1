"""The commands that write and read shards."""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from captionscale.commands.arguments import Subparsers, positive
from captionscale.errors import UserError, first_few
from captionscale.escape import for_terminal

if TYPE_CHECKING:
    from captionscale.data.storage import Storage

_DATASETS = {
    "coco": "COCO 2014 or 2017 in its official files, or by lists as Karpathy split it",
    "karpathy": "COCO, Flickr8k or Flickr30k by Karpathy's dataset_*.json",
    "flickr8k": "Flickr8k in its official files",
    "flickr30k": "Flickr30k in its official files",
    "table": "your own images by a CSV or JSONL file: image,caption[,split][,image_id]",
    "folder": "your own images, each with a .txt of captions beside it, or without captions",
    "webdataset": "tars of images with .txt or .json, as img2dataset writes them",
}


def add(subparsers: Subparsers) -> None:
    """Add them to the command line."""
    pack = subparsers.add_parser(
        "pack", help="write a data set as shards", description="Write a data set as shards."
    )
    kinds = pack.add_subparsers(required=True, metavar="DATASET")
    for kind, text in _DATASETS.items():
        reader = kinds.add_parser(kind, help=text, description=f"Pack {text}.")
        if kind == "webdataset":
            reader.add_argument(
                "--tars", type=Path, nargs="+", required=True, help="tar files, or their folders"
            )
        else:
            reader.add_argument("--images", type=Path, required=True, help="folder of the image files")
        if kind == "coco":
            reader.add_argument(
                "--captions",
                type=Path,
                nargs="+",
                required=True,
                help="official file; with --lists, both of 2014",
            )
            reader.add_argument("--lists", type=Path, help="folder of karpathy_{train,val,test}_images.txt")
        elif kind not in ("folder", "webdataset"):
            reader.add_argument("--captions", type=Path, required=True, help="the data set's caption file")
        if kind in ("coco", "karpathy"):
            reader.add_argument(
                "--restval",
                choices=("train", "drop"),
                help="images of COCO's val2014 outside Karpathy's val and test (default: train)",
            )
        if kind in ("flickr8k", "flickr30k"):
            reader.add_argument(
                "--splits", type=Path, help="folder of the official lists of each split's images"
            )
        elif kind != "karpathy":
            default = None if kind == "coco" else "train"
            reader.add_argument(
                "--split", default=default, help="name of the split" + " (default: train)" * bool(default)
            )
        reader.set_defaults(command_name="pack", handler=_pack, kind=kind)
        _add_packing(reader)

    verify = subparsers.add_parser("verify", help="prove that shards are what was packed")
    verify.add_argument("shards", help="folder, or URL")
    verify.add_argument("--deep", action="store_true", help="decode every image too")
    verify.add_argument(
        "--allow-leaks", action="store_true", help="note the same image in two splits, no more"
    )
    verify.add_argument("--workers", type=positive, metavar="N", help="threads (default: one for each core)")
    verify.add_argument("--json", action="store_true", help="for machines, with every problem and note")
    verify.set_defaults(command_name="verify", handler=_verify)

    show = subparsers.add_parser("show", help="show one sample of the shards")
    show.add_argument("shards", help="folder, or URL")
    show.add_argument("image_id", type=int, metavar="ID")
    show.add_argument("--save", type=Path, metavar="FILE", help="write the stored image bytes there")
    show.set_defaults(command_name="show", handler=_show)

    stats = subparsers.add_parser("stats", help="count what the shards hold")
    stats.add_argument("shards", help="folder, or URL")
    stats.add_argument(
        "--min-count", type=positive, default=5, metavar="N", help="as data.min_count (default: 5)"
    )
    stats.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .pdf or .svg")
    stats.set_defaults(command_name="stats", handler=_stats)


def _add_packing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the shards; a second split is added"
    )
    parser.add_argument("--images-per-shard", type=positive, default=1000, metavar="N")
    parser.add_argument(
        "--resize",
        type=positive,
        metavar="PIXELS",
        help="shrink images to this shorter side (default: as they are)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        choices=range(1, 101),
        metavar="1..100",
        help="of shrunk JPEGs (default: 95)",
    )
    parser.add_argument(
        "--no-decode",
        action="store_true",
        help="look at the images' headers alone: faster, and damage is found later",
    )
    parser.add_argument(
        "--max-rejected",
        type=_share,
        default=0.001,
        metavar="SHARE",
        help="of unreadable images (default: 0.001)",
    )
    parser.add_argument(
        "--expect",
        type=_expected,
        action="append",
        default=[],
        metavar="SPLIT=IMAGES",
        help="refuse other totals",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes (default: one for each core)"
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted 0 to 1, such as 0.001")
    return share


def _expected(text: str) -> tuple[str, int]:
    split, _, images = text.partition("=")
    if not split or not images.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a split and its images, such as train=113287")
    return split, int(images)


def _pack(options: argparse.Namespace) -> None:
    from captionscale.tools.pack import pack

    pack(options)


def _verify(options: argparse.Namespace) -> None:
    from captionscale.data.storage import open_storage

    with tempfile.TemporaryDirectory(prefix="captionscale-") as fresh:
        # What a URL gives now, not what an earlier download left.
        _verify_place(open_storage(options.shards, Path(fresh)), options)


def _verify_place(place: "Storage", options: argparse.Namespace) -> None:
    from captionscale.data.storage import read_manifest
    from captionscale.data.verification import verify
    from captionscale.machine import cpu_count
    from captionscale.progress import progress, say

    splits = read_manifest(place).splits
    with progress("verifying", sum(facts.images for facts in splits.values())) as bar:
        found = verify(
            place,
            deep=options.deep,
            allow_leaks=options.allow_leaks,
            workers=options.workers or cpu_count(),
            progress=bar.advance,
        )
    if options.json:
        images = {name: facts.images for name, facts in splits.items()}
        tree = {"shards": options.shards, "images": images, **asdict(found)}
        print(json.dumps(tree, indent=1))
    for note in [] if options.json else first_few(found.notes, "--json"):
        say(f"note: {note}")
    if found.problems:
        lines = [] if options.json else first_few(found.problems, "--json")
        verdict = f"{options.shards}: NOT as packed; problems: {len(found.problems):,}"
        raise UserError(*lines, verdict)
    if not options.json:
        counts = ", ".join(f"{name} {facts.images:,}" for name, facts in splits.items())
        print(f"{options.shards}: as packed: images: {counts}")


def _show(options: argparse.Namespace) -> None:
    from captionscale.data import decode, shards
    from captionscale.data.storage import open_storage
    from captionscale.files import atomic_write

    split, item = shards.find_image(open_storage(options.shards), options.image_id)
    data = split.image(item)
    info = decode.image_info(data, f"image {options.image_id}", full_decode=True)
    sample = split.sample(item)
    print(f"image {options.image_id}  {for_terminal(sample.file)}  split {split.name}")
    print(f"{info.width} x {info.height} pixels, {len(data):,} bytes of {info.extension}")
    for caption in sample.captions:
        print(f"  {for_terminal(caption)}")
    if options.save:
        with atomic_write(options.save) as file:
            file.write(data)


def _stats(options: argparse.Namespace) -> None:
    from captionscale.data.storage import open_storage
    from captionscale.tools.dataset_stats import print_stats

    print_stats(open_storage(options.shards), min_count=options.min_count, plot=options.plot)
