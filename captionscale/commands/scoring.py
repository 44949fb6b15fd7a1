"""`caption`, `score` and `compare`."""

import argparse
import json
import math
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captionscale.commands.arguments import (
    Commands,
    add_ensemble,
    add_images,
    add_json,
    add_run,
    add_search,
    add_shards,
    positive,
    require_images_or_split,
    search_overrides,
)
from captionscale.errors import UserError
from captionscale.escape import for_terminal
from captionscale.train.run_folder import require_run

if TYPE_CHECKING:
    from captionscale.tools.ensemble import CheckpointEnsemble

_STOPPED = "score: stopped by {}; no receipt was written, run the same command again"


def add(commands: Commands) -> None:
    """Add them to the command line."""
    caption = commands.add(
        "caption",
        "caption image files, or a whole split",
        _caption,
        example="caption runs/attention photo.jpg another.jpg --beam 5",
    )
    add_run(caption)
    add_images(caption)
    add_shards(caption)
    caption.add_argument(
        "--out", type=Path, metavar="FILE", help="with --split: file of the captions, in COCO results format"
    )
    add_search(caption)
    add_ensemble(caption)
    caption.add_argument("--prefix", default="", metavar="WORDS", help="words that every caption begins with")
    caption.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="WORD",
        help="word that every caption contains; repeatable",
    )
    add_json(caption)

    score = commands.add(
        "score",
        "score a run on a split, or a file of captions",
        _score_or_stop,
        example="score runs/attention --split val --beam 5",
    )
    add_run(score, required=False)
    score.add_argument("--split", help="split of the run's shards")
    add_shards(score)
    add_search(score)
    add_ensemble(score)
    for option, metavar, text in (
        ("--captions", "FILE", "without a run: the captions to score, in COCO results format"),
        ("--references", "FILE", "without a run: references, in COCO captions format"),
        ("--out", "FILE", "receipt (default: in RUN/scores/; without a run, none is written)"),
        ("--spice", "DIR", "also compute SPICE: folder with Stanford CoreNLP 3.6.0"),
        ("--clip", "FILE", "with a run, also compute CLIPScore: CLIP's weights"),
    ):
        score.add_argument(option, type=Path, metavar=metavar, help=text)
    score.add_argument(
        "--meteor-gb",
        type=_gigabytes,
        default=1.3,
        metavar="GB",
        help="memory limit of METEOR's Java processes (default: %(default)s)",
    )
    score.add_argument(
        "--reference-implementation", action="store_true", help="use pycocoevalcap's own classes: slower"
    )
    score.add_argument(
        "--clip-model", default="ViT-B-32-quickgelu", help="open_clip model of --clip (default: %(default)s)"
    )
    _add_metric(score, "a metric of your own too; repeatable")
    add_json(score)

    compare = commands.add(
        "compare",
        "test whether one receipt is better than another",
        _compare,
        example="compare runs/attention runs/attention_scst",
    )
    compare.add_argument("first", type=Path, metavar="A", help="a receipt, or a run that has only one")
    compare.add_argument("second", type=Path, metavar="B", help="the other one")
    compare.add_argument(
        "--limit",
        type=positive,
        default=5,
        metavar="N",
        help="show the N images that changed most (default: %(default)s)",
    )
    _add_metric(compare, "a metric of your own in both receipts; repeatable")
    add_json(compare)


def _add_metric(command: argparse.ArgumentParser, help: str) -> None:  # noqa: A002
    command.add_argument("--metric", action="append", default=[], metavar="MODULE:CLASS", help=help)


def _caption(options: argparse.Namespace) -> None:
    usage = "RUN IMAGE ... without --out, as captions are printed, or RUN --split NAME --out FILE"
    require_images_or_split(options, usage)
    if bool(options.split) != bool(options.out):
        raise UserError(f"caption: expected either {usage}")
    members = _open(options)
    from captionscale.tools.captioner_api import CaptionPipeline
    from captionscale.tools.scoring import caption_run

    words: dict[str, Any] = {"prefix": options.prefix, "require": options.require}
    if options.split:
        count = caption_run(members, options.split, shards=options.shards, out=options.out, **words)
        if count is not None:
            print(f"{options.out}: {count:,} captions, in COCO's results format")
        return
    captions = CaptionPipeline(members).caption(options.images, **words)
    pairs = list(zip(options.images, captions, strict=True))
    if options.json:
        tree = [
            {"image": str(path), "caption": each.caption, "log_prob": each.log_prob} for path, each in pairs
        ]
        print(json.dumps(tree, indent=1))
        return
    for path, found in pairs:
        print(f"{for_terminal(str(path))}\t{for_terminal(found.caption)}")


def _open(options: argparse.Namespace) -> "CheckpointEnsemble":
    """Return RUN and the other runs of --ensemble."""
    require_run(options.run)
    from captionscale.tools.ensemble import open_ensemble

    return open_ensemble(
        options.run, options.others, checkpoint=options.checkpoint, overrides=search_overrides(options)
    )


def _score_or_stop(options: argparse.Namespace) -> None:
    try:
        _score(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_STOPPED.format("Ctrl-C")) from None


def _score(options: argparse.Namespace) -> None:
    by_run = options.run is not None and not (options.captions or options.references)
    if by_run and not options.split:
        raise UserError(f"score {options.run}: no --split; say which, such as --split val")
    if not by_run and (options.run is not None or not (options.captions and options.references)):
        raise UserError("score: expected either RUN --split NAME, or --captions FILE --references FILE")
    if not by_run and (options.split or options.shards or search_overrides(options) or options.others):
        raise UserError(
            "score: found --split, --shards, --beam, --set or --ensemble with --captions, which sets what is"
            " scored; leave them out"
        )
    if options.clip and not by_run:
        raise UserError(
            "score --clip: found --captions and no images, expected a run's split; leave out --clip, or give"
            " RUN --split NAME"
        )
    if by_run:
        require_run(options.run)
    from captionscale.score.diagnostics import table
    from captionscale.score.metrics import measure

    # Schedulers end jobs with it: Java and its files are cleaned up, as after Ctrl-C.
    signal.signal(signal.SIGTERM, _stop)
    place = options.out
    common: dict[str, Any] = {
        "measure": partial(
            measure,
            meteor_gb=options.meteor_gb,
            reference_implementation=options.reference_implementation,
        ),
        "spice_jars": options.spice,
        "metrics": options.metric,
    }
    if by_run:
        from captionscale.tools.scoring import score_run

        clip = (options.clip, options.clip_model) if options.clip else None
        receipt, place = score_run(
            _open(options), options.split, shards=options.shards, out=options.out, clip=clip, **common
        )
        if receipt is None:
            return
    else:
        # It does not import torch, which takes seconds.
        from captionscale.tools.score_file import score_file

        receipt = score_file(options.captions, options.references, options.out, **common)
    if options.json:
        tree = {"scores": receipt.scores, "intervals": receipt.intervals, "receipt": place and str(place)}
        print(json.dumps(tree, indent=1))
        return
    width = max(map(len, receipt.scores))
    for name, value in receipt.scores.items():
        low, high = receipt.intervals[name]
        print(f"{name:{width}} {value:.10f}  [{low:.4f}, {high:.4f}]")
    print("", *table(receipt.diagnostics), "", *receipt.notes, sep="\n")
    print(f"{receipt.counts['images']:,} images{f'; receipt: {place}' if place else ''}")


def _stop(*_: object) -> None:
    raise UserError(_STOPPED.format("SIGTERM"))


def _gigabytes(text: str) -> float:
    gigabytes = float(text)
    if not math.isfinite(gigabytes):
        raise argparse.ArgumentTypeError(f"{text}: expected a number, such as 1.3")
    return gigabytes


def _compare(options: argparse.Namespace) -> None:
    from captionscale.score import Receipt
    from captionscale.score.comparison import compare, find_receipt, table

    first, second = (find_receipt(path) for path in (options.first, options.second))
    found = compare(Receipt.read(first), Receipt.read(second), top=options.limit, metrics=options.metric)
    if options.json:
        print(json.dumps({"first": str(first), "second": str(second), **asdict(found)}, indent=1))
    else:
        print(f"A: {first}", f"B: {second}", "", *table(found), sep="\n")
