"""`demo` and `export`: a run for other people and other programs."""

import argparse
from pathlib import Path

from captionscale.commands.arguments import (
    Commands,
    add_checkpoint,
    add_ensemble,
    add_run,
    add_shards,
)
from captionscale.train.run_folder import require_run


def add(commands: Commands) -> None:
    """Add them to the command line."""
    demo = commands.add(
        "demo",
        "serve a page and an HTTP endpoint that caption images",
        _demo,
        example="demo runs/attention",
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
