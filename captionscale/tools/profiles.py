"""What a launch profile says, and whether an experiment fits to it and to a machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.files import cpu_count, read_file

_MAX_PROCESSES = 10**6
_ZERO = "DEEPSPEED"


def read_profile(path: Path) -> dict[str, Any]:
    """Return what a launch profile says, such as `num_processes` of a machine.

    Raises:
        UserError: It is not one.
    """
    try:
        facts = yaml.safe_load(read_file(path))
        if not 1 <= int(facts["num_processes"]) <= _MAX_PROCESSES:
            raise ValueError
    # What PyYAML lets out on a damaged file is anything.
    except Exception as error:
        raise UserError(
            f"{path}: not a profile ({type(error).__name__}); wanted an Accelerate config with num_processes,"
            " such as launch/cpu.yaml"
        ) from None
    profile: dict[str, Any] = facts
    if (kind := profile.get("distributed_type")) not in ("MULTI_GPU", _ZERO):
        # A list of aliases may be longer than memory once it is written out.
        found = kind if isinstance(kind, str | bool | None) else f"a {type(kind).__name__}"
        raise UserError(
            f"{path}: distributed_type is {found!s:.80}, wanted MULTI_GPU, on CPUs too, or {_ZERO};"
            " set it, as launch/cpu.yaml and launch/zero2.yaml do"
        )
    return profile


def check_process_count(settings: Config, count: int, machines: int, profile: Mapping[str, Any]) -> None:
    """Refuse processes that cannot share the micro-batches of a step.

    Args:
        settings: The experiment to train.
        count: Processes over all machines.
        machines: How many there are.
        profile: As `read_profile` gives it.

    Raises:
        UserError: There are too many, or ZeRO would need a number of them that divides the micro-batches.
    """
    zero = is_zero(profile)
    batches = settings.train.global_batch // settings.train.micro_batch
    fitting = [n for n in range(machines, count, machines) if n <= batches and not (zero and batches % n)]
    if count <= batches and not (zero and batches % count):
        return
    cures = [f"take {pluralize(fitting[-1], 'process')}"] if fitting else []
    cures += ["lower train.micro_batch" if count > batches else "take --profile gpu"]
    raise UserError(
        f"{pluralize(count, 'process')}: train.global_batch = {settings.train.global_batch} holds"
        f" {pluralize(batches, 'micro-batch')} of train.micro_batch = {settings.train.micro_batch},"
        f" wanted {'a multiple of the processes under ZeRO' if zero else 'at least one for each process'};"
        f" {', or '.join(cures)}"
    )


def check_core_count(settings: Config, here: int) -> None:
    """Refuse a machine that has not even the cores for one process's decoding threads.

    Args:
        settings: The experiment to train.
        here: Processes on this machine.

    Raises:
        UserError: It has not.
    """
    if settings.data.workers > cpu_count():
        raise UserError(
            f"data.workers = {settings.data.workers}: found {cpu_count()} cores in this machine, or in this"
            " job's part of it, wanted one for each thread that decodes; --set data.workers="
            f"{max(1, cpu_count() // here)}, or ask for more cores"
        )


def oversubscription_note(settings: Config, here: int) -> str:
    """Return what there is to say of more decoding threads than cores; nothing, if there are enough.

    Args:
        settings: The experiment to train.
        here: Processes on this machine.
    """
    threads = here * settings.data.workers
    if threads <= cpu_count():
        return ""
    return (
        f"{pluralize(here, 'process')} with data.workers = {settings.data.workers} on {cpu_count()} cores;"
        f" ask SLURM for --cpus-per-task={threads}, or lower data.workers"
    )


def is_zero(profile: Mapping[str, Any]) -> bool:
    """Return whether a profile is one of DeepSpeed's."""
    return profile.get("distributed_type") == _ZERO


def pluralize(number: int, word: str) -> str:
    """Return a number of things, in words such as `1 process` and `2 processes`."""
    plural = word + ("es" if word.endswith(("s", "ch")) else "s")
    return f"{number} {word if number == 1 else plural}"
