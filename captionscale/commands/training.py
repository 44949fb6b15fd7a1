"""`train`, and the commands that start it or prepare it."""

import argparse
import json
from pathlib import Path

from captionscale.commands.arguments import (
    Commands,
    add_config,
    add_job_size,
    add_json,
    add_profile,
    load_config,
    positive,
)


def add(commands: Commands) -> None:
    """Add them to the command line."""
    train = commands.add(
        "train",
        "train a captioner; if the run exists, resume it",
        _train,
        example="train attention --set train.lr=2e-4 --out runs/attention",
    )
    add_config(train)
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    train.add_argument(
        "--trace-steps",
        type=positive,
        default=0,
        metavar="N",
        help="write a PyTorch profiler trace of N steps to RUN/profile/",
    )
    # For `drill`, which compares the images of all steps.
    train.add_argument("--sample-log", action="store_true", help=argparse.SUPPRESS)

    launch = commands.add(
        "launch",
        "run a command in several processes",
        _launch,
        example="launch --profile gpu --processes 4 -- train attention --out runs/attention",
    )
    add_profile(launch, "cpu")
    launch.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="number of processes over all nodes (default: the profile's)",
    )
    launch.add_argument("--log-dir", type=Path, metavar="DIR", help="also write each process's output there")
    launch.add_argument("--dry-run", action="store_true", help="print the command, and exit")
    launch.set_defaults(parse=commands.parse)
    launch.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")

    submit = commands.add(
        "submit",
        "submit a SLURM job that trains, and resumes as another job at its time limit",
        _submit,
        example="submit attention --nodes 2 --gpus 8 --time 4:00:00",
    )
    add_config(submit)
    submit.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (default: runs/CONFIG)")
    add_job_size(submit, 1)
    add_profile(submit, "gpu")
    submit.add_argument("--dry-run", action="store_true", help="print the job's script, and exit")

    drill = commands.add(
        "drill",
        "kill a short run at random, resume it on other numbers of processes, and compare the result",
        _drill,
        example="drill attention --kills 6 --processes 1,2,3",
    )
    add_config(drill)
    drill.add_argument(
        "--kills", type=positive, default=6, metavar="N", help="number of kills (default: %(default)s)"
    )
    drill.add_argument(
        "--processes",
        type=_numbers,
        default=(1, 2, 3),
        metavar="N,...",
        help="numbers of processes to choose from (default: 1,2,3)",
    )
    drill.add_argument(
        "--steps", type=positive, default=20, metavar="N", help="steps of the run (default: %(default)s)"
    )
    drill.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the kills (default: %(default)s)"
    )
    add_profile(drill, "cpu")
    drill.add_argument(
        "--out",
        type=Path,
        default=Path("drill"),
        metavar="DIR",
        help="folder of both runs (default: %(default)s)",
    )

    config = commands.add(
        "config",
        "print a config with all its defaults; without CONFIG, list the shipped configs",
        _config,
        example="config attention --set train.lr=2e-4",
    )
    add_config(config, required=False)
    add_json(config)

    quickstart = commands.add(
        "quickstart",
        "run every step once on synthetic images: draw, pack, train, score, caption, report",
        _quickstart,
        example="quickstart --out quickstart",
    )
    quickstart.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        metavar="DIR",
        help="folder of all its files (default: %(default)s)",
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(number) for number in text.split(","))


def _train(options: argparse.Namespace) -> None:
    config = load_config(options)

    from captionscale.train import preemption

    # The imports below take seconds, in which a signal may come.
    with preemption.handle_signals(config.train.grace_s):
        from captionscale.train.loop import train

        train(config, options.out, options.trace_steps, sample_log=options.sample_log)


def _launch(options: argparse.Namespace) -> None:
    from captionscale.tools.launcher import launch

    command = options.command[options.command[:1] == ["--"] :]
    # What is wrong is reported here once, not by each process.
    inner = options.parse(command)
    launch(
        command,
        profile=options.profile,
        processes=options.processes,
        dry_run=options.dry_run,
        logs=options.log_dir,
        config=load_config(inner) if inner.command_name == "train" else None,
    )


def _submit(options: argparse.Namespace) -> None:
    from captionscale.tools.submit import submit

    submit(
        load_config(options),
        options.out or Path("runs", Path(options.config).stem),
        nodes=options.nodes,
        gpus=options.gpus,
        time=options.time,
        profile=options.profile,
        dry_run=options.dry_run,
    )


def _drill(options: argparse.Namespace) -> None:
    from captionscale.tools.drill import drill

    same = drill(
        load_config(options),
        options.out,
        profile=options.profile,
        ranks=options.processes,
        kills=options.kills,
        steps=options.steps,
        seed=options.seed,
    )
    if not same:
        raise SystemExit(1)


def _config(options: argparse.Namespace) -> None:
    from captionscale import assets, toml

    if options.config is None:
        names = assets.names("configs", ".toml")
        print(json.dumps(names) if options.json else "\n".join(names))
    elif options.json:
        print(load_config(options).model_dump_json(indent=1))
    else:
        print(toml.dumps(load_config(options)), end="")


def _quickstart(options: argparse.Namespace) -> None:
    from captionscale.tools.quickstart import quickstart

    quickstart(options.out)
