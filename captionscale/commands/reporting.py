"""`attend` and `report`: what a run does, as images and as a page."""

import argparse
from pathlib import Path

from captionscale.commands.arguments import (
    Commands,
    add_images,
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


def add(commands: Commands) -> None:
    """Add them to the command line."""
    attend = commands.add(
        "attend",
        "draw the attention map of each word of a caption",
        _attend,
        example="attend runs/attention photo.jpg --out attention",
    )
    add_run(attend)
    add_images(attend)
    attend.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N images of the split (default: all)"
    )
    add_shards(attend)
    attend.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the PNG files")
    add_search(attend)

    report = commands.add(
        "report",
        "write a page about a run, in one file that needs no network",
        _report,
        example="report runs/attention --against runs/show_and_tell",
    )
    add_run(report)
    report.add_argument("--out", type=Path, metavar="FILE", help="page (default: RUN/report.html)")
    report.add_argument("--against", type=Path, metavar="RUN", help="another run to compare with")
    add_shards(report)


def _attend(options: argparse.Namespace) -> None:
    require_images_or_split(options, "RUN IMAGE ... --out DIR, or RUN --split NAME --out DIR")
    if options.limit and not options.split:
        raise UserError("attend: --limit counts images of a split, expected --split with it; leave it out")
    require_run(options.run)
    from captionscale.tools.attend import attend, attend_split

    overrides = search_overrides(options)
    if options.split:
        for page in attend_split(
            options.run,
            options.split,
            options.out,
            checkpoint=options.checkpoint,
            shards=options.shards,
            limit=options.limit,
            overrides=overrides,
        ):
            print(for_terminal(str(page)), flush=True)
        return
    for path, found in attend(
        options.run, options.images, options.out, checkpoint=options.checkpoint, overrides=overrides
    ):
        print(f"{for_terminal(str(path))}\t{for_terminal(found.caption)}", flush=True)


def _report(options: argparse.Namespace) -> None:
    require_run(options.run)
    from captionscale.tools.report import report

    out = options.out or options.run / "report.html"
    size_bytes = report(options.run, out, against=options.against, shards=options.shards)
    print(f"{out}: {size_bytes / 1e6:.1f} MB, everything in one file; open it in any browser")
