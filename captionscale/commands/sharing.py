"""`attend`, `report`, `demo` and `export`: look at a run, and share it."""

import argparse
from pathlib import Path
from typing import Any

from captionscale.commands.arguments import (
    Commands,
    add_checkpoint,
    add_ensemble,
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

    demo = commands.add(
        "demo", "serve a page and an HTTP endpoint that caption images", _demo, example="demo runs/attention"
    )
    add_run(demo)
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine alone)"
    )
    demo.add_argument(
        "--port", type=int, default=7860, metavar="N", help="port; 0: a free one (default: %(default)s)"
    )
    demo.add_argument("--share", action="store_true", help="also serve it through a public link of gradio's")
    demo.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer requests to this host name, such as a proxy's; repeatable",
    )
    add_shards(demo)
    add_checkpoint(demo)
    add_ensemble(demo)

    export = commands.add(
        "export",
        "write a run as ONNX, as PyTorch programs, or for the Hugging Face hub",
        _export,
        example="export runs/attention --format onnx --out exported",
    )
    add_run(export)
    export.add_argument("--format", choices=("onnx", "torch", "hub"), required=True, help="what to write")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    export.add_argument(
        "--batch-size", type=int, metavar="N", help="fixed batch size (default: any batch size)"
    )
    add_shards(export)
    add_checkpoint(export)


def _attend(options: argparse.Namespace) -> None:
    require_images_or_split(options, "RUN IMAGE ... --out DIR, or RUN --split NAME --out DIR")
    if options.limit and not options.split:
        raise UserError("attend: --limit counts images of a split, expected --split with it; leave it out")
    require_run(options.run)
    from captionscale.tools.attend import attend, attend_split

    run, out = options.run, options.out
    search: dict[str, Any] = {"checkpoint": options.checkpoint, "overrides": search_overrides(options)}
    if options.split:
        pages = attend_split(run, options.split, out, shards=options.shards, limit=options.limit, **search)
        for page in pages:
            print(for_terminal(str(page)), flush=True)
    else:
        for path, found in attend(run, options.images, out, **search):
            print(f"{for_terminal(str(path))}\t{for_terminal(found.caption)}", flush=True)


def _report(options: argparse.Namespace) -> None:
    require_run(options.run)
    from captionscale.tools.report import report

    out = options.out or options.run / "report.html"
    size_bytes = report(options.run, out, against=options.against, shards=options.shards)
    print(f"{out}: {size_bytes / 1e6:.1f} MB, everything in one file; open it in any browser")


def _demo(options: argparse.Namespace) -> None:
    require_run(options.run)
    from captionscale.tools.demo.server import serve

    serve(
        options.run,
        checkpoint=options.checkpoint,
        others=options.others,
        host=options.host,
        port=options.port,
        share=options.share,
        shards=options.shards,
        allowed=options.allow_host,
    )


def _export(options: argparse.Namespace) -> None:
    require_run(options.run)
    from captionscale.tools.export.bundle import export

    print(
        export(
            options.run,
            options.format,
            options.out,
            batch=options.batch_size,
            shards=options.shards,
            checkpoint=options.checkpoint,
        )
    )
