"""Launch profiles, and whether an experiment fits a profile and a machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.files import read_file
from captionscale.machine import cpu_count

_MAX_PROCESSES = 10**6
_ZERO = "DEEPSPEED"


def read_profile(path: Path) -> dict[str, Any]:
    """Return a launch profile, such as `num_processes` of a node.

    Raises:
        UserError: It is no Accelerate config that our engine supports.
    """
    try:
        profile: dict[str, Any] = yaml.safe_load(read_file(path))
        if not 1 <= int(profile["num_processes"]) <= _MAX_PROCESSES:
            raise ValueError
    # PyYAML raises errors of any kind on a damaged file.
    except Exception as error:
        raise UserError(
            f"{path}: not a profile ({type(error).__name__}), expected an Accelerate config with"
            " num_processes; see launch/cpu.yaml"
        ) from None
    if (kind := profile.get("distributed_type")) not in ("MULTI_GPU", _ZERO):
        # A list of YAML aliases can be longer than memory once it is printed.
        found = kind if isinstance(kind, str | bool | None) else f"a {type(kind).__name__}"
        raise UserError(
            f"{path}: distributed_type is {found!s:.80}, expected MULTI_GPU, on CPUs too, or {_ZERO};"
            " set it as in launch/cpu.yaml or launch/zero2.yaml"
        )
    return profile


def check_process_count(config: Config, count: int, nodes: int, profile: Mapping[str, Any]) -> None:
    """Refuse processes, counted on all nodes, that cannot share the micro-batches of a step.

    Raises:
        UserError: There are too many, or ZeRO needs a number that divides the micro-batches.
    """
    zero = is_zero(profile)
    batches = config.train.global_batch // config.train.micro_batch
    fitting = [n for n in (*range(nodes, count, nodes), count) if n <= batches and not (zero and batches % n)]
    if count in fitting:
        return
    cures = [f"take {pluralize(fitting[-1], 'process')}"] if fitting else []
    cures += ["lower train.micro_batch" if count > batches else "take --profile gpu"]
    raise UserError(
        f"{pluralize(count, 'process')}: train.global_batch = {config.train.global_batch} holds"
        f" {pluralize(batches, 'micro-batch')} of train.micro_batch = {config.train.micro_batch}, expected"
        f" {'a multiple of the processes under ZeRO' if zero else 'at least one for each process'};"
        f" {', or '.join(cures)}"
    )


def check_core_count(config: Config, local_processes: int) -> None:
    """Raise a UserError on a node with fewer cores than one process has decoding threads."""
    if config.data.workers > cpu_count():
        raise UserError(
            f"data.workers = {config.data.workers}: found {cpu_count()} cores for this job on this node,"
            " expected one for each decoding thread;"
            f" --set data.workers={max(1, cpu_count() // local_processes)}, or ask for more cores"
        )


def oversubscription_note(config: Config, local_processes: int) -> str:
    """Return a note if all processes of a node have more decoding threads than it has cores, else nothing."""
    threads = local_processes * config.data.workers
    if threads <= cpu_count():
        return ""
    return (
        f"{pluralize(local_processes, 'process')} with data.workers = {config.data.workers} on {cpu_count()}"
        f" cores; ask SLURM for --cpus-per-task={threads}, or lower data.workers"
    )


def is_zero(profile: Mapping[str, Any]) -> bool:
    """Return whether a profile uses DeepSpeed."""
    return profile.get("distributed_type") == _ZERO


def pluralize(number: int, word: str) -> str:
    """Return a number with its noun, such as `1 process` and `2 processes`."""
    plural = word + ("es" if word.endswith(("s", "ch")) else "s")
    return f"{number} {word if number == 1 else plural}"
