"""Start a command in several processes: profile and SLURM job become one `accelerate launch` command."""

import argparse
import logging
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil

from captionscale import assets
from captionscale.config import Config
from captionscale.errors import PreemptedError, UserError
from captionscale.escape import for_shell
from captionscale.machine import cpu_count, gpu_names
from captionscale.progress import say
from captionscale.subprocesses import LAUNCHER
from captionscale.tools.profiles import (
    check_core_count,
    check_process_count,
    is_zero,
    oversubscription_note,
    pluralize,
    read_profile,
)
from captionscale.train import preemption

_PORT = 29_500
_RANK_VARIABLES = ("LOCAL_RANK", "RANK", "OMPI_COMM_WORLD_RANK")
"""Set by torchrun, Kubeflow or mpirun in each process that they start."""
_RESUMES = "the same command resumes from the last checkpoint"


def launch(
    command: Sequence[str],
    *,
    profile: str,
    processes: int | None,
    dry_run: bool,
    logs: Path | None = None,
    config: Config | None = None,
) -> None:
    """Run `captionscale COMMAND` in every process that the profile requests, and wait for all of them.

    In a SLURM job with several nodes, run once on each node (`srun --ntasks-per-node=1`), it joins them.

    Args:
        command: A command and its arguments.
        profile: A file, or a name in `launch/`.
        processes: Total over all nodes; None: the profile's.
        dry_run: Print the `accelerate launch` command instead.
        logs: Folder for the output of each process; each line on the terminal then names its rank.
        config: The experiment, if the processes train one.

    Raises:
        UserError: An unknown or unreadable profile, an unknown environment, or processes that do not fit the
            nodes or the experiment.
        SystemExit: A process failed, and has reported why; or a signal stopped them all.
    """
    path = assets.find("launch", profile, ".yaml")
    facts = read_profile(path)
    nodes, node, address, port = detect_nodes()
    count = processes or int(facts["num_processes"]) * nodes
    if count % nodes:
        raise UserError(
            f"--processes {count}: {nodes} nodes cannot share them evenly, expected a multiple of {nodes};"
            " change --processes"
        )
    local = count // nodes
    cpu = bool(facts.get("use_cpu")) or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if config:
        check_process_count(config, count, nodes, facts)
        # A dry run may be for another machine.
        if not dry_run:
            check_core_count(config, local)
        if not cpu and (note := oversubscription_note(config, local)):
            say(f"note: {note}")
    # Accelerate's launcher for several CPU processes needs MPI. Its GPU launcher serves both; this variable
    # keeps each process on the CPU.
    environment = {"ACCELERATE_USE_CPU": "true"} if cpu else {}
    arguments = ["--config_file", str(path), "--num_processes", str(count), "--num_machines", str(nodes)]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if not threads.isdecimal():
        threads = str(max(1, cpu_count() // local))
    arguments += ["--num_cpu_threads_per_process", threads]
    if is_zero(facts):
        # Accelerate does not pass the number on to DeepSpeed's processes, which would have one thread each.
        environment["OMP_NUM_THREADS"] = threads
    if nodes > 1:
        arguments += ["--machine_rank", str(node), "--main_process_ip", address]
        # Otherwise the launcher that ends last reports at length that the first one is gone.
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    # Port 0: any free one.
    arguments += ["--main_process_port", str(port)]
    if logs:
        # 3: both streams, to files and to the terminal.
        arguments += ["--log_dir", str(logs / os.uname().nodename), "--tee", "3"]
        environment["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}] "
    arguments += ["--module", "captionscale", *command]
    if dry_run:
        # A quoted `name=value` would be no assignment.
        assignments = [f"{name}={for_shell(value)}" for name, value in environment.items()]
        print(*assignments, for_shell("accelerate", "launch", *arguments))
        return
    if is_zero(facts) and find_spec("deepspeed") is None:
        raise UserError(
            f"{path}: DeepSpeed is not installed, expected captionscale's extra 'deepspeed';"
            " pip install 'captionscale[deepspeed]', or take --profile gpu"
        )
    os.environ.update(environment)
    os.environ[LAUNCHER] = str(os.getpid())
    if not cpu and (found := len(gpu_names())) < local:
        raise UserError(
            f"{path}: {local} processes on a machine with {found} GPUs, expected a GPU for each;"
            " pass --processes, or take --profile cpu"
        )
    _run(arguments)


def _run(arguments: list[str]) -> None:
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.agent.server import api as agent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(arguments)
    try:
        load_config_from_file(options.config_file)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{options.config_file}: Accelerate refuses it ({error}), expected a config like"
            " launch/cpu.yaml; correct it"
        ) from None

    # The launcher's report on every other process would bury the error of the one that failed.
    for logger in (logging.getLogger("torch.distributed.elastic"), agent.logger):
        logger.setLevel(logging.CRITICAL)
    try:
        with _forward_signals(options) as forwarded:
            launch_command(options)
    except subprocess.CalledProcessError as error:
        raise SystemExit(_exit_code(0, error.returncode, forwarded)) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise SystemExit(_exit_code(rank, failure.exitcode, forwarded)) from None
    except SignalException as error:
        # Its processes have ended; each rank has received the signal too.
        say(f"captionscale: stopped by {error.sigval.name}; {_RESUMES}")
        raise SystemExit(128 + error.sigval) from None


@contextmanager
def _forward_signals(options: argparse.Namespace) -> Iterator[list[signal.Signals]]:
    """Forward the signals on which a run saves and exits to its processes; yield those received so far.

    torch's launcher, whose `options` this changes, would kill a process that saves for over 30 seconds.
    """
    from torch.distributed.elastic.multiprocessing import api

    forwarded: list[signal.Signals] = []

    def forward(number: int, _: object) -> None:
        again = number == signal.SIGINT in forwarded
        forwarded.append(signal.Signals(number))
        children = psutil.Process().children()
        if not children:
            # The processes have not started, and would never receive it.
            raise SystemExit(128 + number)
        for child in children:
            # The terminal sends Ctrl-C to its whole process group.
            if again or number != signal.SIGINT or os.getpgid(child.pid) != os.getpgrp():
                child.send_signal(signal.SIGKILL if again else number)

    options.signals_to_handle = "SIGHUP,SIGQUIT"
    # After a failure the others wait for the failed rank: SIGTERM would ask them to save, which they cannot.
    default, api._get_default_signal = api._get_default_signal, lambda: signal.SIGKILL
    handlers = [signal.signal(number, forward) for number in preemption.SIGNALS]
    try:
        yield forwarded
    finally:
        api._get_default_signal = default
        for number, handler in zip(preemption.SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def _exit_code(rank: int, code: int, forwarded: list[signal.Signals]) -> int:
    """Return the exit code of a launch in which this rank ended first, with this code."""
    if forwarded.count(signal.SIGINT) > 1:
        say(f"captionscale: ended by a second Ctrl-C; {_RESUMES}")
        return 128 + signal.SIGINT
    if code == PreemptedError.EXIT_CODE:
        return code
    if -code in forwarded:
        # The signal came while Python started. Its cause is unknown: srun sends SIGTERM to the other nodes
        # when one has failed, and such a job must not be requeued for ever.
        say(f"captionscale: stopped by {forwarded[0].name}; {_RESUMES}")
        return 128 - code
    if code < 0:
        say(
            f"captionscale: rank {rank} on {os.uname().nodename} was killed by {signal.Signals(-code).name},"
            f" which ends the run; if nobody sent it, the machine may have run out of memory; {_RESUMES}"
        )
        return 128 - code
    return 1


def detect_nodes() -> tuple[int, int, str, int]:
    """Return the number of nodes, the index of this one, and the address and port of the first.

    Raises:
        UserError: Another launcher has started this process, or SLURM has not started it once on each node.
    """
    for name in _RANK_VARIABLES:
        if name in os.environ:
            raise UserError(
                f"{name} = {os.environ[name]}: another launcher has started this process, expected"
                " captionscale to be the only one; leave out `captionscale launch --`, or that launcher"
            )
    facts = {name.removeprefix("SLURM_"): value for name, value in os.environ.items()}
    # A step can have fewer nodes than its job.
    nodes = int(facts.get("STEP_NUM_NODES", facts.get("JOB_NUM_NODES", "1")))
    launchers = int(facts.get("STEP_NUM_TASKS", "1"))
    if nodes == launchers == 1:
        return 1, 0, "localhost", 0
    if launchers != nodes:
        raise UserError(
            f"SLURM: {pluralize(launchers, 'launcher')} on {pluralize(nodes, 'node')}, expected one on each;"
            " start it with srun --ntasks-per-node=1"
        )
    for name in ("JOB_ID", "NODEID", "STEP_NODELIST"):
        if name not in facts:
            raise UserError(
                f"SLURM_{name}: not set, expected as srun sets it on {pluralize(nodes, 'node')};"
                " start it with srun --ntasks-per-node=1, and pass its environment into a container"
            )
    # The first of `gpu[01-04,07],cpu3`; `scontrol` is not available inside a container.
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", facts["STEP_NODELIST"]).split(",")[0]
    # A port for each job: two jobs may share a node.
    return nodes, int(facts["NODEID"]), first, _PORT + int(facts["JOB_ID"]) % 1000
