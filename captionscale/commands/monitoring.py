"""The commands that look after a run: before it starts, and while it is at work."""

import argparse
import sys
from pathlib import Path

from captionscale.commands.arguments import Subparsers, add_config, load_config, positive


def add(subparsers: Subparsers) -> None:
    """Add them to the command line."""
    doctor = subparsers.add_parser(
        "doctor",
        help="look whether a job will work, before it is submitted",
        description="Look whether a job will work. Without CONFIG, look at this machine alone.",
    )
    add_config(doctor, required=False)
    doctor.add_argument("--out", type=Path, metavar="RUN", help="folder of the run, there or to come")
    doctor.add_argument("--nodes", type=positive, help="machines (default: those of this job, or this one)")
    doctor.add_argument("--gpus", type=positive, help="of each node (default: as the profile says)")
    doctor.add_argument("--time", help="of the job, such as 4:00:00 (default: that of this job)")
    doctor.add_argument(
        "--profile", help="a file, or a name in launch/ (default: one process, as captionscale train)"
    )
    doctor.add_argument("--quick", action="store_true", help="leave out what takes more than a moment")
    doctor.add_argument("--json", action="store_true", help="print a document for programs")
    doctor.set_defaults(command_name="doctor", handler=_doctor)

    watch = subparsers.add_parser("watch", help="follow a run, from any machine that sees its folder")
    watch.add_argument("run", type=Path, metavar="RUN", help="its folder")
    watch.add_argument("--once", action="store_true", help="print how it stands, and end")
    watch.add_argument(
        "--interval", type=positive, default=5, metavar="S", help="seconds between two looks (default: 5)"
    )
    watch.set_defaults(command_name="watch", handler=_watch)


def _doctor(options: argparse.Namespace) -> None:
    from captionscale.tools.doctor.doctor import doctor
    from captionscale.tools.doctor.report import exit_process

    healthy = doctor(
        (lambda: load_config(options)) if options.config else None,
        out=options.out,
        nodes=options.nodes,
        gpus=options.gpus,
        time_limit=options.time,
        profile=options.profile,
        quick=options.quick,
        as_json=options.json,
    )
    sys.stdout.flush()
    exit_process(0 if healthy else 1)


def _watch(options: argparse.Namespace) -> None:
    from captionscale.tools.watch import watch

    watch(options.run, once=options.once, every_s=float(options.interval))
