"""Start a verb in several processes: profile and surroundings become one `accelerate launch` command."""

import logging
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from captionscale import assets
from captionscale.errors import UserError
from captionscale.progress import say

_PORT = 29_500


def launch(command: Sequence[str], *, profile: str, processes: int | None, dry_run: bool) -> None:
    """Run `captionscale COMMAND` in every process that the profile asks for, and wait for all of them.

    Inside a SLURM job with several nodes, run once on each node (`srun --ntasks-per-node=1`), it joins them.

    Args:
        command: A verb and its arguments.
        profile: A file, or a name in `launch/`.
        processes: How many over all machines; none: as the profile says.
        dry_run: Print the command instead.

    Raises:
        UserError: An unknown or unreadable profile, or processes that the machines cannot share evenly.
        SystemExit: A process failed, and has told why; or a signal stopped them all.
    """
    path = assets.find("launch", profile, ".yaml")
    facts = _read(path)
    machines, machine, address, port = _surroundings()
    count = processes or int(facts["num_processes"]) * machines
    if count % machines:
        raise UserError(
            f"--processes {count}: {machines} machines cannot share them evenly;"
            f" wanted a multiple of {machines}; change --processes"
        )
    arguments = ["--config_file", str(path), "--num_processes", str(count), "--num_machines", str(machines)]
    arguments += ["--num_cpu_threads_per_process", str(max(1, _cores() // (count // machines)))]
    if machines > 1:
        arguments += ["--machine_rank", str(machine), "--main_process_ip", address]
    # Port 0: any free one.
    arguments += ["--main_process_port", str(port)]
    arguments += ["--module", "captionscale", *command]
    if not facts.get("use_cpu") and not dry_run:
        _refuse_missing_gpus(path, count // machines)
    # Accelerate's own launcher knows several processes on CPUs only by MPI; its launcher for GPUs serves
    # both, and each process reads from this variable that it is to stay on the CPU.
    environment = {"ACCELERATE_USE_CPU": "true"} if facts.get("use_cpu") else {}
    if dry_run:
        words = [f"{name}={value}" for name, value in environment.items()]
        print(shlex.join([*words, "accelerate", "launch", *arguments]))
        return
    os.environ.update(environment)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A process that fails has told why; what the launcher then says of each of the others would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError:
        raise SystemExit(1) from None
    except SignalException as error:
        # Its processes have been ended; each rank has had the signal too.
        say(
            f"captionscale: stopped by {error.sigval.name}; the same command goes on from the last checkpoint"
        )
        raise SystemExit(128 + error.sigval) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
        if int(facts["num_processes"]) < 1:
            raise ValueError
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a profile ({type(error).__name__}); wanted an Accelerate config with num_processes,"
            " such as launch/cpu.yaml"
        ) from None
    profile: dict[str, Any] = facts
    return profile


def _surroundings() -> tuple[int, int, str, int]:
    """Return how many machines there are, which one this is, and the address and port of the first.

    Raises:
        UserError: SLURM has given several, but does not say which one this is, or what they are called.
    """
    machines = int(os.environ.get("SLURM_NNODES", 1))
    if machines == 1:
        return 1, 0, "localhost", 0
    try:
        machine, nodes = int(os.environ["SLURM_NODEID"]), os.environ["SLURM_JOB_NODELIST"]
        # The job's own port: two jobs may share a node.
        port = _PORT + int(os.environ["SLURM_JOB_ID"]) % 1000
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (KeyError, OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"SLURM_NNODES = {machines}, but this process cannot find the first of these machines ({error});"
            " wanted to run once on each; start it by srun --ntasks-per-node=1"
        ) from None
    return machines, machine, names.stdout.split()[0], port


def _refuse_missing_gpus(profile: Path, processes: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if found < processes:
        raise UserError(
            f"{profile}: {processes} processes on a machine with {found} GPUs, wanted a GPU for each;"
            " pass --processes, or take --profile cpu"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
