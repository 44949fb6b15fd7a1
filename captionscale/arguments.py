"""What can be said on the command line."""

import argparse
from pathlib import Path

from captionscale.version import __version__

_DATASETS = {
    "coco": "COCO 2014 or 2017 in its official files, or by lists as Karpathy split it",
    "karpathy": "COCO, Flickr8k or Flickr30k by Karpathy's dataset_*.json",
    "flickr8k": "Flickr8k in its official files",
    "flickr30k": "Flickr30k in its official files",
    "table": "your own images by a CSV or JSONL file: image,caption[,split][,image_id]",
    "folder": "your own images, each with a .txt of captions beside it, or without captions",
    "webdataset": "tars of images with .txt or .json, as img2dataset writes them",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; `verb` is the name of what was asked for."""
    parser = argparse.ArgumentParser(
        "captionscale",
        description="Train image captioners on any number of GPUs, and score them like the leaderboards.",
    )
    parser.add_argument("--version", action="version", version=f"captionscale {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    pack = verbs.add_parser(
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
        reader.set_defaults(verb="pack", kind=kind)
        _add_packing(reader)

    verify = verbs.add_parser("verify", help="prove that shards are what was packed")
    verify.add_argument("shards", help="folder, or URL")
    verify.add_argument("--deep", action="store_true", help="decode every image too")
    verify.add_argument(
        "--allow-leaks", action="store_true", help="note the same image in two splits, no more"
    )
    verify.add_argument("--workers", type=_positive, metavar="N", help="threads (default: one for each core)")
    verify.set_defaults(verb="verify")

    show = verbs.add_parser("show", help="show one sample of the shards")
    show.add_argument("shards", help="folder, or URL")
    show.add_argument("image_id", type=int, metavar="ID")
    show.add_argument("--save", type=Path, metavar="FILE", help="write the stored image bytes there")
    show.set_defaults(verb="show")

    stats = verbs.add_parser("stats", help="count what the shards hold")
    stats.add_argument("shards", help="folder, or URL")
    stats.add_argument(
        "--min-count", type=_positive, default=5, metavar="N", help="as data.min_count (default: 5)"
    )
    stats.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .pdf or .svg")
    stats.set_defaults(verb="stats")

    train = verbs.add_parser("train", help="train a captioner, or go on with one")
    _add_config(train)
    train.add_argument(
        "--out", type=Path, required=True, metavar="RUN", help="folder of the run; if it exists, resume"
    )
    train.set_defaults(verb="train")

    launch = verbs.add_parser(
        "launch", help="run a verb on several processes", description="Run a verb in several processes."
    )
    launch.add_argument(
        "--profile", default="cpu", help="a file, or a name in launch/ (default: %(default)s)"
    )
    launch.add_argument(
        "--processes", type=_positive, help="how many, over all machines (default: the profile's)"
    )
    launch.add_argument(
        "--logs", type=Path, metavar="DIR", help="also keep what each process says, in files there"
    )
    launch.add_argument("--dry-run", action="store_true", help="print the command and stop")
    launch.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VERB ...")
    launch.set_defaults(verb="launch")

    submit = verbs.add_parser(
        "submit", help="train as a SLURM job", description="Write a SLURM job that trains, and submit it."
    )
    _add_config(submit)
    submit.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (default: runs/CONFIG)")
    submit.add_argument("--nodes", type=_positive, default=1, help="machines (default: %(default)s)")
    submit.add_argument("--gpus", type=_positive, help="of each node (default: none is asked for)")
    submit.add_argument("--time", help="longest, such as 4:00:00; then it goes on as the next job")
    submit.add_argument(
        "--profile", default="gpu", help="a file, or a name in launch/ (default: %(default)s)"
    )
    submit.add_argument("--dry-run", action="store_true", help="print the job and stop")
    submit.set_defaults(verb="submit")

    caption = verbs.add_parser("caption", help="caption image files, or a whole split")
    caption.add_argument("run", type=Path, metavar="RUN")
    caption.add_argument("images", type=Path, nargs="*", metavar="IMAGE")
    caption.add_argument("--split", help="instead of images: a split of the run's shards")
    caption.add_argument("--shards", help="other shards than the run was trained on: folder, or URL")
    caption.add_argument("--out", type=Path, metavar="RESULTS", help="of a split: where COCO results go")
    _add_search(caption)
    caption.set_defaults(verb="caption")

    score = verbs.add_parser("score", help="score a run on a split, or a file of captions")
    score.add_argument("run", type=Path, nargs="?", metavar="RUN")
    score.add_argument("--split", help="split of the run's shards")
    score.add_argument("--shards", help="other shards than the run was trained on: folder, or URL")
    _add_search(score)
    score.add_argument(
        "--captions", type=Path, metavar="RESULTS", help="without a run: captions in COCO results format"
    )
    score.add_argument(
        "--references", type=Path, metavar="CAPTIONS", help="without a run: captions in COCO format"
    )
    score.add_argument(
        "--out", type=Path, metavar="RECEIPT", help="where the receipt goes (with a run: beside it)"
    )
    score.set_defaults(verb="score")

    drill = verbs.add_parser("drill", help="kill a run at random, resume it on other ranks, prove the result")
    _add_config(drill)
    drill.add_argument("--kills", type=_positive, default=6, metavar="N", help="(default: %(default)s)")
    drill.add_argument(
        "--ranks", type=_ranks, default=(1, 2, 3), metavar="N,...", help="to choose from (default: 1,2,3)"
    )
    drill.add_argument(
        "--steps", type=_positive, default=20, metavar="N", help="of the run (default: %(default)s)"
    )
    drill.add_argument("--seed", type=int, default=0, help="of the accidents (default: %(default)s)")
    drill.add_argument("--profile", default="cpu", help="as of launch (default: %(default)s)")
    drill.add_argument(
        "--out", type=Path, default=Path("drill"), help="folder for both runs (default: %(default)s)"
    )
    drill.set_defaults(verb="drill")

    bench = verbs.add_parser("bench", help="measure ours beside the ways that people have today")
    what = bench.add_subparsers(required=True, metavar="WHAT", dest="what")
    packing = what.add_parser("pack", help="from image files to shards")
    packing.add_argument("--images", type=Path, help="folder of JPEGs (default: drawn ones)")
    packing.add_argument(
        "--folder", type=Path, help="where to write (default: the system's temporary folder)"
    )
    packing.add_argument(
        "--count", type=_positive, default=1000, metavar="N", help="images in a run (default: 1000)"
    )
    packing.set_defaults(verb="bench")
    saving = what.add_parser("save", help="what a checkpoint costs the training loop")
    _add_config(saving, required=False)
    saving.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    saving.set_defaults(verb="bench", config="attention")
    step = what.add_parser("step", help="what the machinery costs a training step, and how fast a run starts")
    _add_config(step, required=False)
    step.set_defaults(verb="bench")
    order = what.add_parser("order", help="what each rank reads, on 1 to 1,024 ranks")
    order.add_argument("--shards", help="folder, or URL, to measure beside the simulation")
    order.add_argument("--split", default="train", help="of these shards (default: %(default)s)")
    order.set_defaults(verb="bench")
    for parts in what.choices.values():
        parts.add_argument(
            "--rounds", type=_positive, default=5, metavar="N", help="of each way (default: 5)"
        )
        parts.add_argument("--json", action="store_true", help="for machines")

    config = verbs.add_parser(
        "config", help="print a config with all its defaults; without a name, list them"
    )
    _add_config(config, required=False)
    config.set_defaults(verb="config")

    quickstart = verbs.add_parser(
        "quickstart", help="everything once, on drawn pictures: draw, pack, train, score, caption"
    )
    quickstart.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder for it all (default: %(default)s)"
    )
    quickstart.set_defaults(verb="quickstart")
    return parser


def _add_packing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the shards; a second split is added"
    )
    parser.add_argument("--images-per-shard", type=_positive, default=1000, metavar="N")
    parser.add_argument(
        "--resize",
        type=_positive,
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
        "--workers", type=_positive, metavar="N", help="processes (default: one for each core)"
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted at least 1")
    return number


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(_positive(number) for number in text.split(","))


def _add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", nargs=None if required else "?", help="a path, or a name in configs/"
    )
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="changes")


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--beam", type=_positive, help="captions kept at each word (default: the run's config)"
    )
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: %(default)s)")
