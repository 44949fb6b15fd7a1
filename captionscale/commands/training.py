"""The commands that train."""

import argparse
from pathlib import Path

from captionscale.commands.arguments import Subparsers, add_config, load_config, positive


def add(subparsers: Subparsers) -> None:
    """Add them to the command line."""
    train = subparsers.add_parser("train", help="train a captioner, or go on with one")
    add_config(train)
    train.add_argument(
        "--out", type=Path, required=True, metavar="RUN", help="folder of the run; if it exists, resume"
    )
    train.add_argument(
        "--profile",
        type=positive,
        default=0,
        metavar="N",
        help="also write where the time of N steps goes, into RUN/profile/",
    )
    train.set_defaults(command_name="train", handler=_train)

    launch = subparsers.add_parser(
        "launch", help="run a command on several processes", description="Run a command in several processes."
    )
    launch.add_argument(
        "--profile", default="cpu", help="a file, or a name in launch/ (default: %(default)s)"
    )
    launch.add_argument(
        "--processes", type=positive, help="how many, over all machines (default: the profile's)"
    )
    launch.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="also keep what each process says, in files there"
    )
    launch.add_argument("--dry-run", action="store_true", help="print the command and stop")
    launch.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    launch.set_defaults(command_name="launch", handler=_launch)

    submit = subparsers.add_parser(
        "submit", help="train as a SLURM job", description="Write a SLURM job that trains, and submit it."
    )
    add_config(submit)
    submit.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (default: runs/CONFIG)")
    submit.add_argument("--nodes", type=positive, default=1, help="machines (default: %(default)s)")
    submit.add_argument("--gpus", type=positive, help="of each node (default: none is asked for)")
    submit.add_argument("--time", help="longest, such as 4:00:00; then it goes on as the next job")
    submit.add_argument(
        "--profile", default="gpu", help="a file, or a name in launch/ (default: %(default)s)"
    )
    submit.add_argument("--dry-run", action="store_true", help="print the job and stop")
    submit.set_defaults(command_name="submit", handler=_submit)

    drill = subparsers.add_parser(
        "drill", help="kill a run at random, resume it on other ranks, prove the result"
    )
    add_config(drill)
    drill.add_argument("--kills", type=positive, default=6, metavar="N", help="(default: %(default)s)")
    drill.add_argument(
        "--ranks", type=_ranks, default=(1, 2, 3), metavar="N,...", help="to choose from (default: 1,2,3)"
    )
    drill.add_argument(
        "--steps", type=positive, default=20, metavar="N", help="of the run (default: %(default)s)"
    )
    drill.add_argument("--seed", type=int, default=0, help="of the accidents (default: %(default)s)")
    drill.add_argument("--profile", default="cpu", help="as of launch (default: %(default)s)")
    drill.add_argument(
        "--out", type=Path, default=Path("drill"), help="folder for both runs (default: %(default)s)"
    )
    drill.set_defaults(command_name="drill", handler=_drill)

    config = subparsers.add_parser(
        "config", help="print a config with all its defaults; without a name, list them"
    )
    add_config(config, required=False)
    config.set_defaults(command_name="config", handler=_config)

    quickstart = subparsers.add_parser(
        "quickstart", help="everything once, on drawn pictures: draw, pack, train, score, caption, report"
    )
    quickstart.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder for it all (default: %(default)s)"
    )
    quickstart.set_defaults(command_name="quickstart", handler=_quickstart)


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(positive(number) for number in text.split(","))


def _train(options: argparse.Namespace) -> None:
    config = load_config(options)

    from captionscale.train import preemption

    # From here on: it takes seconds to import what trains.
    with preemption.handle_signals(config.train.grace_s):
        from captionscale.train.loop import train

        train(config, options.out, options.profile)


def _launch(options: argparse.Namespace) -> None:
    from captionscale.commands.parser import parser
    from captionscale.tools.launcher import launch

    command = options.command[options.command[:1] == ["--"] :]
    # What no process can do is refused here, once, and not by each of them.
    inner = parser().parse_args(command)
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
        ranks=options.ranks,
        kills=options.kills,
        steps=options.steps,
        seed=options.seed,
    )
    if not same:
        raise SystemExit(1)


def _config(options: argparse.Namespace) -> None:
    from captionscale import assets, toml

    if options.config is None:
        print("\n".join(assets.names("configs", ".toml")))
    else:
        print(toml.dumps(load_config(options)), end="")


def _quickstart(options: argparse.Namespace) -> None:
    from captionscale.tools.quickstart import quickstart

    quickstart(options.out)
