"""The commands that show people what a run does."""

import argparse
from pathlib import Path

from captionscale.commands.arguments import Subparsers, add_search, positive, search_overrides
from captionscale.errors import UserError
from captionscale.escape import for_terminal
from captionscale.train.run_folder import require_run


def add(subparsers: Subparsers) -> None:
    """Add them to the command line."""
    attend = subparsers.add_parser("attend", help="draw where the model looks for each word of its captions")
    attend.add_argument("run", type=Path, metavar="RUN")
    attend.add_argument("images", type=Path, nargs="*", metavar="IMAGE")
    attend.add_argument("--split", help="instead of images: a split of the run's shards, ten images a page")
    attend.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N images of the split (default: all)"
    )
    attend.add_argument("--shards", help="other shards than the run was trained on: folder, or URL")
    attend.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the pictures, PNGs")
    add_search(attend)
    attend.set_defaults(command_name="attend", handler=_attend)

    report = subparsers.add_parser("report", help="write a page about a run: one file that opens anywhere")
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, metavar="FILE", help="(default: RUN/report.html)")
    report.add_argument("--against", type=Path, metavar="RUN", help="what changed since this other run")
    report.add_argument("--shards", help="other shards than the run was trained on: folder, or URL")
    report.set_defaults(command_name="report", handler=_report)


def _attend(options: argparse.Namespace) -> None:
    if bool(options.images) == bool(options.split):
        raise UserError("attend: wanted either RUN IMAGE ... --out DIR, or RUN --split NAME --out DIR")
    if options.limit and not options.split:
        raise UserError("attend: --limit is of a split's images, wanted --split with it; leave it out")
    require_run(options.run)
    from captionscale.tools.attend import attend, attend_split

    if options.split:
        for page in attend_split(
            options.run,
            options.split,
            options.out,
            checkpoint=options.checkpoint,
            shards=options.shards,
            limit=options.limit,
            overrides=search_overrides(options),
        ):
            print(for_terminal(str(page)), flush=True)
        return
    for place, gaze in attend(
        options.run,
        options.images,
        options.out,
        checkpoint=options.checkpoint,
        overrides=search_overrides(options),
    ):
        print(f"{for_terminal(str(place))}\t{for_terminal(gaze.caption)}", flush=True)


def _report(options: argparse.Namespace) -> None:
    require_run(options.run)
    from captionscale.tools.report import report

    out = options.out or options.run / "report.html"
    size_bytes = report(options.run, out, against=options.against, shards=options.shards)
    print(f"{out}: {size_bytes / 1e6:.1f} MB, everything in one file; open it in any browser")
