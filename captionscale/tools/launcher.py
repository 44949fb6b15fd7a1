"""Start a command in several processes: profile and surroundings become one `accelerate launch` command."""

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

from captionscale import assets
from captionscale.config import Config
from captionscale.errors import PreemptedError, UserError
from captionscale.escape import for_shell
from captionscale.files import cpu_count
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

_PORT = 29_500
_OTHERS = ("LOCAL_RANK", "RANK", "OMPI_COMM_WORLD_RANK")
"""What torchrun, Kubeflow or mpirun set in each process that they start."""
_LEAVE = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def launch(
    command: Sequence[str],
    *,
    profile: str,
    processes: int | None,
    dry_run: bool,
    logs: Path | None = None,
    settings: Config | None = None,
) -> None:
    """Run `captionscale COMMAND` in every process that the profile asks for, and wait for all of them.

    In a SLURM job with several nodes, run once on each node (`srun --ntasks-per-node=1`), it joins them.

    Args:
        command: A command and its arguments.
        profile: A file, or a name in `launch/`.
        processes: How many over all machines; none: as the profile says.
        dry_run: Print the command instead.
        logs: Folder that also keeps what each process says; on the terminal each line then names its rank.
        settings: Of the experiment that the processes would train, if they would.

    Raises:
        UserError: An unknown or unreadable profile, surroundings that cannot be understood, or processes that
            the machines or the experiment cannot have.
        SystemExit: A process failed, and has told why; or a signal stopped them all.
    """
    path = assets.find("launch", profile, ".yaml")
    facts = read_profile(path)
    machines, machine, address, port = detect_nodes()
    count = processes or int(facts["num_processes"]) * machines
    if count % machines:
        raise UserError(
            f"--processes {count}: {machines} machines cannot share them evenly;"
            f" wanted a multiple of {machines}; change --processes"
        )
    here = count // machines
    cpu = bool(facts.get("use_cpu")) or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if settings:
        check_process_count(settings, count, machines, facts)
        # A dry run may be for another machine.
        if not dry_run:
            check_core_count(settings, here)
        if not cpu and (note := oversubscription_note(settings, here)):
            say(f"note: {note}")
    # Accelerate's own launcher knows several processes on CPUs only by MPI; its launcher for GPUs serves
    # both, and each process reads from this variable that it is to stay on the CPU.
    environment = {"ACCELERATE_USE_CPU": "true"} if cpu else {}
    arguments = ["--config_file", str(path), "--num_processes", str(count), "--num_machines", str(machines)]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads if threads.isdecimal() else str(max(1, cpu_count() // here))
    arguments += ["--num_cpu_threads_per_process", threads]
    if is_zero(facts):
        # Accelerate passes the number on to all but these, who would then have one thread each.
        environment["OMP_NUM_THREADS"] = threads
    if machines > 1:
        arguments += ["--machine_rank", str(machine), "--main_process_ip", address]
        # Else the launcher that ends last tells at length that the first one is gone.
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    # Port 0: any free one.
    arguments += ["--main_process_port", str(port)]
    if logs:
        # 3: both streams, to files and to the terminal.
        arguments += ["--log_dir", str(logs / os.uname().nodename), "--tee", "3"]
        environment["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}] "
    arguments += ["--module", "captionscale", *command]
    if dry_run:
        # Quoted as a whole it would be no assignment.
        words = [f"{name}={for_shell(value)}" for name, value in environment.items()]
        print(*words, for_shell("accelerate", "launch", *arguments))
        return
    if is_zero(facts) and find_spec("deepspeed") is None:
        raise UserError(
            f"{path}: DeepSpeed is not installed, wanted captionscale's extra 'deepspeed';"
            " pip install 'captionscale[deepspeed]', or take --profile gpu"
        )
    os.environ.update(environment)
    os.environ[LAUNCHER] = str(os.getpid())
    if not cpu:
        _refuse_missing_gpus(path, here)
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
            f"{options.config_file}: Accelerate refuses it ({error}); wanted a config like launch/cpu.yaml;"
            " correct it"
        ) from None

    # A process that fails has told why; what the launcher then says of each of the others would bury it.
    for logger in (logging.getLogger("torch.distributed.elastic"), agent.logger):
        logger.setLevel(logging.CRITICAL)
    try:
        with _passing_signals_on(options) as passed:
            launch_command(options)
    except subprocess.CalledProcessError as error:
        raise SystemExit(_ending(0, error.returncode, passed)) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise SystemExit(_ending(rank, failure.exitcode, passed)) from None
    except SignalException as error:
        # Its processes have been ended; each rank has had the signal too.
        say(
            f"captionscale: stopped by {error.sigval.name}; the same command goes on from the last checkpoint"
        )
        raise SystemExit(128 + error.sigval) from None


@contextmanager
def _passing_signals_on(options: argparse.Namespace) -> Iterator[list[signal.Signals]]:
    """Give signals that ask a run to leave to its processes, which then save, and give them all their time.

    torch's launcher would pass them on too, but end after 30 seconds what is still saving.

    Args:
        options: Of `accelerate launch`; changed.

    Returns:
        The signals that came so far.
    """
    from torch.distributed.elastic.multiprocessing import api

    passed: list[signal.Signals] = []

    def pass_on(number: int, _: object) -> None:
        again = number == signal.SIGINT in passed
        passed.append(signal.Signals(number))
        children = Path("/proc/thread-self/children").read_text().split()
        if not children:
            # The processes have not started, and would never hear of it.
            raise SystemExit(128 + number)
        for process in map(int, children):
            # What is in the terminal's own group has had the Ctrl-C already.
            if again or number != signal.SIGINT or os.getpgid(process) != os.getpgrp():
                os.kill(process, signal.SIGKILL if again else number)

    options.signals_to_handle = "SIGHUP,SIGQUIT"
    # One that fails leaves the others waiting for it: SIGTERM would only ask them to save, which they cannot.
    closing, api._get_default_signal = api._get_default_signal, lambda: signal.SIGKILL
    handlers = {number: signal.signal(number, pass_on) for number in _LEAVE}
    try:
        yield passed
    finally:
        api._get_default_signal = closing
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ending(rank: int, code: int, passed: list[signal.Signals]) -> int:
    """Return the exit code of a launch whose process of this rank ended first, with this code."""
    if passed.count(signal.SIGINT) > 1:
        say("captionscale: ended by a second Ctrl-C; the same command goes on from the last checkpoint")
        return 128 + signal.SIGINT
    if code == PreemptedError.EXIT_CODE:
        return code
    if -code in passed:
        # It came before the process could take note, while Python started. Nor is it known why it came: srun
        # sends SIGTERM to the other machines when one has failed, and such a job must not be tried for ever.
        say(f"captionscale: left for {passed[0].name}; the same command goes on from the last checkpoint")
        return 128 - code
    if code < 0:
        say(
            f"captionscale: rank {rank} on {os.uname().nodename} was killed by {signal.Signals(-code).name},"
            " which ends the run; if nobody did so, it may have wanted more memory than there is;"
            " the same command goes on from the last checkpoint"
        )
        return 128 - code
    return 1


def detect_nodes() -> tuple[int, int, str, int]:
    """Return how many machines there are, which one this is, and the address and port of the first.

    Raises:
        UserError: Another launcher is at work, or SLURM has given several machines but not started this
            process once on each.
    """
    for name in _OTHERS:
        if name in os.environ:
            raise UserError(
                f"{name} = {os.environ[name]}: another launcher has started this process as one of several,"
                " wanted to be the only one; leave out `captionscale launch --`, or that launcher"
            )
    facts = {name.removeprefix("SLURM_"): value for name, value in os.environ.items()}
    # A step may have fewer machines than its job.
    machines = int(facts.get("STEP_NUM_NODES", facts.get("JOB_NUM_NODES", "1")))
    launchers = int(facts.get("STEP_NUM_TASKS", "1"))
    if machines == launchers == 1:
        return 1, 0, "localhost", 0
    if launchers != machines:
        raise UserError(
            f"SLURM: {pluralize(launchers, 'launcher')} on {pluralize(machines, 'machine')}, wanted one on"
            " each; start it by srun --ntasks-per-node=1"
        )
    for name in ("JOB_ID", "NODEID", "STEP_NODELIST"):
        if name not in facts:
            raise UserError(
                f"SLURM_{name}: not set, wanted as srun sets it on {pluralize(machines, 'machine')};"
                " start it by srun --ntasks-per-node=1, and let a container have its environment"
            )
    # The first of `gpu[01-04,07],cpu3`; `scontrol` would tell, but is not inside a container.
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", facts["STEP_NODELIST"]).split(",")[0]
    # The job's own port: two jobs may share a node.
    return machines, int(facts["NODEID"]), first, _PORT + int(facts["JOB_ID"]) % 1000


def _refuse_missing_gpus(profile: Path, processes: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if found < processes:
        raise UserError(
            f"{profile}: {processes} processes on a machine with {found} GPUs, wanted a GPU for each;"
            " pass --processes, or take --profile cpu"
        )
