"""The verbs that caption and score."""

import argparse
from pathlib import Path

from captionscale.errors import UserError
from captionscale.verbs.values import Verbs, positive


def add(verbs: Verbs) -> None:
    """Add them to the command line."""
    caption = verbs.add_parser("caption", help="caption image files, or a whole split")
    caption.add_argument("run", type=Path, metavar="RUN")
    caption.add_argument("images", type=Path, nargs="*", metavar="IMAGE")
    caption.add_argument("--split", help="instead of images: a split of the run's shards")
    caption.add_argument("--shards", help="other shards than the run was trained on: folder, or URL")
    caption.add_argument("--out", type=Path, metavar="RESULTS", help="of a split: where COCO results go")
    _add_search(caption)
    caption.set_defaults(verb="caption", handler=_caption)

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
    score.set_defaults(verb="score", handler=_score)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--beam", type=positive, help="captions kept at each word (default: the run's config)"
    )
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: %(default)s)")


def _caption(options: argparse.Namespace) -> None:
    from captionscale.score.evaluate import caption_files
    from captionscale.tools.scoring import caption_run
    from captionscale.train.checkpoint import open_run

    if bool(options.images) == bool(options.split) or bool(options.split) != bool(options.out):
        raise UserError("caption: wanted either RUN IMAGE ..., or RUN --split NAME --out RESULTS")
    if options.split:
        count = caption_run(
            options.run,
            options.split,
            checkpoint=options.checkpoint,
            beam=options.beam,
            shards=options.shards,
            out=options.out,
        )
        if count is not None:
            print(f"{options.out}: {count:,} captions, in COCO's results format")
        return
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
