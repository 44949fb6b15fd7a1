"""The commands that hand a run to others."""

import argparse
from pathlib import Path

from captionscale.commands.arguments import Subparsers, add_ensemble
from captionscale.train.run_folder import require_run


def add(subparsers: Subparsers) -> None:
    """Add them to the command line."""
    demo = subparsers.add_parser("demo", help="serve a page to try a run, and an HTTP endpoint")
    demo.add_argument("run", type=Path, metavar="RUN")
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine alone)"
    )
    demo.add_argument("--port", type=int, default=7860, metavar="N", help="0: any (default: %(default)s)")
    demo.add_argument("--share", action="store_true", help="also through a public link of gradio's")
    demo.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer requests to this host name, such as a proxy's (repeatable)",
    )
    demo.add_argument("--shards", help="where sample pictures come from (default: the run's own)")
    demo.add_argument("--checkpoint", default="best", help="best, last or a step (default: %(default)s)")
    add_ensemble(demo)
    demo.set_defaults(command_name="demo", handler=_demo)

    export = subparsers.add_parser("export", help="write a run as ONNX, as PyTorch programs, or for the hub")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--format", choices=("onnx", "torch", "hub"), required=True)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for it")
    export.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="always so many pictures or captions at once (default: any)",
    )
    export.add_argument("--shards", help="where pictures to check it on come from (default: the run's own)")
    export.add_argument("--checkpoint", default="best", help="best, last or a step (default: %(default)s)")
    export.set_defaults(command_name="export", handler=_export)


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
