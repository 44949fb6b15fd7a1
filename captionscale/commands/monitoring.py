"""`doctor` and `watch`: check a job before it starts, and follow it."""

import argparse
import sys
from pathlib import Path

from captionscale.commands.arguments import (
    Commands,
    add_config,
    add_job_size,
    add_json,
    add_profile,
    add_run,
    load_config,
    positive,
)


def add(commands: Commands) -> None:
    """Add them to the command line."""
    doctor = commands.add(
        "doctor",
        "check whether a job will work, before it is submitted; without CONFIG, check this machine",
        _doctor,
        example="doctor attention --out runs/attention --nodes 2 --gpus 8 --profile gpu",
    )
    add_config(doctor, required=False)
    doctor.add_argument("--out", type=Path, metavar="RUN", help="folder of the run, new or existing")
    add_job_size(doctor, None)
    add_profile(doctor, None)
    doctor.add_argument("--quick", action="store_true", help="leave out what takes more than a moment")
    add_json(doctor)

    watch = commands.add(
        "watch", "follow a run, from any machine that sees its folder", _watch, example="watch runs/attention"
    )
    add_run(watch)
    watch.add_argument(
        "--once", action="store_true", help="print the state of the run once, and exit; so does --json"
    )
    add_json(watch)
    watch.add_argument(
        "--interval", type=positive, default=5, metavar="S", help="seconds between updates (default: 5)"
    )


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

    watch(options.run, once=options.once, as_json=options.json, every_s=float(options.interval))
