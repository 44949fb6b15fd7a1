"""The commands that caption and score."""

import argparse
import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

from captionscale.commands.arguments import Subparsers, add_ensemble, add_search, positive, search_overrides
from captionscale.errors import UserError
from captionscale.escape import for_terminal
from captionscale.train.run_folder import require_run

_STOPPED = "score: stopped by {}; no receipt was written, and the same command starts anew"


def add(subparsers: Subparsers) -> None:
    """Add them to the command line."""
    caption = subparsers.add_parser("caption", help="caption image files, or a whole split")
    caption.add_argument("run", type=Path, metavar="RUN")
    caption.add_argument("images", type=Path, nargs="*", metavar="IMAGE")
    caption.add_argument("--split", help="instead of images: a split of the run's shards")
    caption.add_argument("--shards", help="other shards than the run was trained on: folder, or URL")
    caption.add_argument("--out", type=Path, metavar="RESULTS", help="of a split: where COCO results go")
    add_search(caption)
    add_ensemble(caption)
    caption.add_argument("--prefix", default="", metavar="WORDS", help="what every caption begins with")
    caption.add_argument(
        "--require", action="append", default=[], metavar="WORD", help="that every caption holds; repeatable"
    )
    caption.set_defaults(command_name="caption", handler=_caption)

    score = subparsers.add_parser("score", help="score a run on a split, or a file of captions")
    score.add_argument("run", type=Path, nargs="?", metavar="RUN")
    score.add_argument("--split", help="split of the run's shards")
    score.add_argument("--shards", help="other shards than the run was trained on: folder, or URL")
    add_search(score)
    add_ensemble(score)
    score.add_argument(
        "--captions", type=Path, metavar="RESULTS", help="without a run: captions in COCO results format"
    )
    score.add_argument(
        "--references", type=Path, metavar="CAPTIONS", help="without a run: captions in COCO format"
    )
    score.add_argument(
        "--out", type=Path, metavar="RECEIPT", help="where the receipt goes (with a run: beside it)"
    )
    score.add_argument(
        "--meteor-gb", type=_gigabytes, metavar="GB", help="most memory that METEOR's Java may take"
    )
    score.add_argument(
        "--reference-implementation", action="store_true", help="by pycocoevalcap's own classes: slower"
    )
    score.add_argument(
        "--spice", type=Path, metavar="DIR", help="SPICE too: folder with Stanford CoreNLP 3.6.0"
    )
    score.add_argument(
        "--clip", type=Path, metavar="WEIGHTS", help="with a run, CLIPScore too: CLIP's weights, a file"
    )
    score.add_argument(
        "--clip-model", default="ViT-B-32-quickgelu", help="of open_clip (default: %(default)s)"
    )
    _add_metric(score, "a metric of your own too; repeatable")
    score.set_defaults(command_name="score", handler=_score_or_stop)

    compare = subparsers.add_parser(
        "compare", help="tell whether one receipt is better than another, or lucky"
    )
    compare.add_argument("first", type=Path, metavar="A", help="a receipt, or a run that has but one")
    compare.add_argument("second", type=Path, metavar="B")
    compare.add_argument(
        "--top", type=positive, default=5, metavar="N", help="images that changed most (default: %(default)s)"
    )
    _add_metric(compare, "a metric of your own in both receipts; repeatable")
    compare.add_argument("--json", action="store_true", help="for machines")
    compare.set_defaults(command_name="compare", handler=_compare)


def _add_metric(command: argparse.ArgumentParser, help: str) -> None:  # noqa: A002
    command.add_argument("--metric", action="append", default=[], metavar="MODULE:CLASS", help=help)


def _caption(options: argparse.Namespace) -> None:
    if bool(options.images) == bool(options.split) or bool(options.split) != bool(options.out):
        raise UserError(
            "caption: wanted either RUN IMAGE ... without --out, as captions are printed, or RUN --split NAME"
            " --out RESULTS"
        )
    require_run(options.run)
    from captionscale.tools.captioner_api import CaptionPipeline
    from captionscale.tools.ensemble import open_ensemble
    from captionscale.tools.scoring import caption_run

    if options.split:
        count = caption_run(
            options.run,
            options.split,
            checkpoint=options.checkpoint,
            shards=options.shards,
            out=options.out,
            overrides=search_overrides(options),
            others=options.others,
            prefix=options.prefix,
            require=options.require,
        )
        if count is not None:
            print(f"{options.out}: {count:,} captions, in COCO's results format")
        return
    members = open_ensemble(
        options.run, options.others, checkpoint=options.checkpoint, overrides=search_overrides(options)
    )
    captions = CaptionPipeline(members).caption(
        options.images, prefix=options.prefix, require=options.require
    )
    for path, found in zip(options.images, captions, strict=True):
        print(f"{for_terminal(str(path))}\t{for_terminal(found.caption)}")


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
        raise UserError("score: wanted either RUN --split NAME, or --captions RESULTS --references CAPTIONS")
    if not by_run and (options.split or options.shards or search_overrides(options) or options.others):
        raise UserError(
            "score: found --split, --shards, --beam, --set or --ensemble beside --captions, which already says"
            " what is scored; leave them out"
        )
    if options.clip and not by_run:
        raise UserError(
            "score --clip: found --captions and no images, wanted a run's split; leave out --clip, or give"
            " RUN --split NAME"
        )
    if by_run:
        require_run(options.run)
    from captionscale.score.diagnostics import table
    from captionscale.score.metrics import measure

    # Schedulers end jobs by it: Java and its files are then put away, as after Ctrl-C.
    signal.signal(signal.SIGTERM, _stop)
    changes: dict[str, Any] = {}
    if options.meteor_gb is not None:
        changes["meteor_gb"] = options.meteor_gb
    if options.reference_implementation:
        changes["reference_implementation"] = True
    by = partial(measure, **changes)
    if by_run:
        from captionscale.tools.scoring import score_run

        receipt, place = score_run(
            options.run,
            options.split,
            checkpoint=options.checkpoint,
            shards=options.shards,
            out=options.out,
            overrides=search_overrides(options),
            others=options.others,
            measure=by,
            spice_jars=options.spice,
            clip=(options.clip, options.clip_model) if options.clip else None,
            metrics=options.metric,
        )
    else:
        # Without what it takes to run a model, whose import takes seconds.
        from captionscale.tools.score_file import score_file

        receipt = score_file(
            options.captions, options.references, options.out, by, options.spice, options.metric
        )
        place = options.out
    if receipt is None:
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
        raise argparse.ArgumentTypeError(f"{text}: wanted a number, such as 1.3")
    return gigabytes


def _compare(options: argparse.Namespace) -> None:
    from captionscale.score import Receipt
    from captionscale.score.comparison import compare, find_receipt, table

    first, second = (find_receipt(path) for path in (options.first, options.second))
    found = compare(Receipt.read(first), Receipt.read(second), top=options.top, metrics=options.metric)
    if options.json:
        print(json.dumps({"first": str(first), "second": str(second), **found.to_dict()}, indent=1))
    else:
        print(f"A: {first}", f"B: {second}", "", *table(found), sep="\n")
