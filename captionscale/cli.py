"""The command line. Each verb imports what it needs, so that `--help` is instant."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captionscale.errors import UserError
from captionscale.version import __version__

if TYPE_CHECKING:
    from captionscale.config import Config


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; an error that the user can fix is one line and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        options.verb(options)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(
            f"{error.filename or 'system'}: {error.strerror or error};"
            " check the path, its rights and the free space"
        )
    except KeyboardInterrupt:
        _fail("stopped by Ctrl-C; the same command goes on where a checkpoint was saved", code=130)


def _fail(text: str, code: int = 1) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"captionscale: {'' if rank == '0' else f'rank {rank}: '}{text}", file=sys.stderr)
    raise SystemExit(code)


def _parser() -> argparse.ArgumentParser:
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
    for kind in ("coco", "flickr8k", "flickr30k"):
        reader = kinds.add_parser(kind, help=f"pack {kind}")
        reader.add_argument("--images", type=Path, required=True, help="folder of the image files")
        reader.add_argument("--captions", type=Path, required=True, help="the data set's caption file")
        if kind == "coco":
            reader.add_argument("--split", required=True, help="name of the split that this caption file is")
        else:
            reader.add_argument(
                "--splits", type=Path, help="folder of the official lists of each split's images"
            )
        reader.add_argument(
            "--out", type=Path, required=True, help="folder of the shards; a second split is added"
        )
        reader.add_argument("--images-per-shard", type=_positive, default=1000, metavar="N")
        reader.set_defaults(verb=_pack, kind=kind)

    verify = verbs.add_parser("verify", help="prove that shards are what was packed")
    verify.add_argument("shards", type=Path)
    verify.set_defaults(verb=_verify)

    show = verbs.add_parser("show", help="show one sample of the shards")
    show.add_argument("shards", type=Path)
    show.add_argument("image_id", type=int, metavar="ID")
    show.add_argument("--save", type=Path, metavar="FILE", help="write the stored image bytes there")
    show.set_defaults(verb=_show)

    train = verbs.add_parser("train", help="train a captioner, or go on with one")
    _add_config(train)
    train.add_argument(
        "--out", type=Path, required=True, metavar="RUN", help="folder of the run; if it exists, resume"
    )
    train.set_defaults(verb=_train)

    launch = verbs.add_parser(
        "launch", help="run a verb on several processes", description="Run a verb in several processes."
    )
    launch.add_argument(
        "--profile", default="cpu", help="a file, or a name in launch/ (default: %(default)s)"
    )
    launch.add_argument(
        "--processes", type=_positive, help="how many, over all machines (default: the profile's)"
    )
    launch.add_argument("--dry-run", action="store_true", help="print the command and stop")
    launch.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VERB ...")
    launch.set_defaults(verb=_launch)

    caption = verbs.add_parser("caption", help="caption image files")
    caption.add_argument("run", type=Path, metavar="RUN")
    caption.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    _add_search(caption)
    caption.set_defaults(verb=_caption)

    score = verbs.add_parser("score", help="score a run on a split, or a file of captions")
    score.add_argument("run", type=Path, nargs="?", metavar="RUN")
    score.add_argument("--split", help="split of the run's shards")
    score.add_argument("--shards", type=Path, help="other shards than the run was trained on")
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
    score.set_defaults(verb=_score)

    config = verbs.add_parser(
        "config", help="print a config with all its defaults; without a name, list them"
    )
    _add_config(config, required=False)
    config.set_defaults(verb=_config)

    quickstart = verbs.add_parser(
        "quickstart", help="everything once, on drawn pictures: draw, pack, train, score, caption"
    )
    quickstart.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder for it all (default: %(default)s)"
    )
    quickstart.set_defaults(verb=_quickstart)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted at least 1")
    return number


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


def _pack(options: argparse.Namespace) -> None:
    from captionscale.data import sources
    from captionscale.data.packing import pack
    from captionscale.progress import progress, say

    if options.kind == "coco":
        records = sources.coco(options.images, options.captions, options.split)
    else:
        records = sources.flickr(options.images, options.captions, options.splits)
        if options.splits is None:
            say(f"note: no --splits, so all {len(records):,} images are in the split 'train'")
    with progress("packing", len(records)) as bar:
        pack(
            records,
            options.out,
            sources=[options.captions],
            images_per_shard=options.images_per_shard,
            progress=bar.advance,
        )
    for split in sorted({record.split for record in records}):
        members = [record for record in records if record.split == split]
        captions = sum(len(record.captions) for record in members)
        print(f"{options.out}: {split}: {len(members):,} images, {captions:,} captions")


def _verify(options: argparse.Namespace) -> None:
    from captionscale.data import shards

    problems = list(shards.verify(options.shards))
    if problems:
        raise UserError("\n".join([*problems, f"{options.shards}: NOT as packed; problems: {len(problems)}"]))
    splits = shards.read_manifest(options.shards)["splits"]
    counts = ", ".join(f"{name} {facts['images']:,}" for name, facts in splits.items())
    print(f"{options.shards}: as packed: images: {counts}")


def _show(options: argparse.Namespace) -> None:
    from captionscale.data import images, shards

    split, item = shards.find(options.shards, options.image_id)
    data = split.image(item)
    picture = images.decode(data, f"image {options.image_id}")
    facts = split.sample_facts(item)
    print(f"image {options.image_id}  {facts['file']}  split {split.name}")
    print(f"{picture.width} x {picture.height} pixels, {len(data):,} bytes of {images.extension(data)}")
    for caption in facts["captions"]:
        print(f"  {caption}")
    if options.save:
        options.save.write_bytes(data)


def _train(options: argparse.Namespace) -> None:
    settings = _settings(options)

    from captionscale.train.loop import train

    train(settings, options.out)


def _settings(options: argparse.Namespace) -> "Config":
    from captionscale import config

    return config.load(options.config, options.changes)


def _launch(options: argparse.Namespace) -> None:
    from captionscale.tools.launcher import launch

    command = options.command[options.command[:1] == ["--"] :]
    # What no process can do is refused here, once, and not by each of them.
    inner = _parser().parse_args(command)
    if inner.verb is _train:
        _settings(inner)
    launch(command, profile=options.profile, processes=options.processes, dry_run=options.dry_run)


def _caption(options: argparse.Namespace) -> None:
    from captionscale.score.evaluate import caption_files
    from captionscale.train.checkpoint import open_run

    saved = open_run(options.run, options.checkpoint)
    captions = caption_files(
        saved.captioner(), options.images, saved.vocabulary(), saved.config().with_beam(options.beam)
    )
    for path, caption in zip(options.images, captions, strict=True):
        print(f"{path}\t{caption}")


def _score(options: argparse.Namespace) -> None:
    from captionscale.tools.scoring import score_file, score_run

    if options.run is not None and not (options.captions or options.references):
        if not options.split:
            raise UserError(f"score {options.run}: no --split; say which, such as --split val")
        scores, receipt = score_run(
            options.run,
            options.split,
            checkpoint=options.checkpoint,
            beam=options.beam,
            shards=options.shards,
            receipt=options.out,
        )
    elif options.run is None and options.captions and options.references:
        scores, receipt = score_file(options.captions, options.references, options.out), options.out
    else:
        raise UserError("score: wanted either RUN --split NAME, or --captions RESULTS --references CAPTIONS")
    if scores is not None:
        for name, value in scores.values.items():
            print(f"{name:8} {value:.10f}")
        print(f"{len(scores.image_ids):,} images{f'; receipt: {receipt}' if receipt else ''}")


def _config(options: argparse.Namespace) -> None:
    from captionscale import assets, config

    if options.config is None:
        print("\n".join(assets.names("configs", ".toml")))
    else:
        print(config.dumps(_settings(options)), end="")


def _quickstart(options: argparse.Namespace) -> None:
    from captionscale.tools.quickstart import quickstart

    quickstart(options.out)
