"""The command `doctor`: check whether a job will work, before it is submitted and when it starts."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.text import Text

from captionscale import assets
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.progress import SafeConsole, spinner
from captionscale.tools.doctor import machine, network, storage, throughput
from captionscale.tools.doctor.plan import Plan, parse_slurm_time
from captionscale.tools.doctor.report import FORMAT, Check, CheckResult, failure_of, run_check, verdict
from captionscale.tools.launcher import detect_nodes
from captionscale.tools.profiles import pluralize, read_profile
from captionscale.train import preemption
from captionscale.version import __version__

_CHECKS = (
    Check("versions", machine.versions, 10, needs_plan=False),
    Check("gpus", machine.gpus, 30, needs_plan=False),
    Check("java", machine.java, 30, needs_plan=False),
    Check("workers", machine.workers, 10),
    Check("shards", storage.shards, 30),
    Check("batches", storage.batches, 30),
    Check("weights", storage.weights, 30),
    Check("disk", storage.disk, 45),
    Check("run", storage.run, 90, slow=True),
    Check("loading", throughput.loading, 90, slow=True),
    Check("finish", throughput.finish, 90),
    Check("evaluator", machine.evaluator, 90, needs_plan=False, slow=True),
)
_STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}
_PORT_OFFSET = 1000
"""Added to the port of the training that follows."""
_OTHERS_S = 60.0


def doctor(
    load: Callable[[], Config] | None,
    *,
    out: Path | None,
    nodes: int | None,
    gpus: int | None,
    time_limit: str | None,
    profile: str | None,
    quick: bool,
    as_json: bool,
) -> bool:
    """Check whether a job will work, and print the results.

    Within a SLURM job of several nodes, run once on each (`srun --ntasks-per-node=1`), it checks all of
    them, and the first one prints.

    Args:
        load: Reads the experiment; None: only this machine is checked.
        out: Folder of the run.
        nodes: Number of nodes; None: those of the job, or one.
        gpus: Of each node; None: the profile's.
        time_limit: Of the job, as SLURM writes it; None: that of the current job.
        profile: A file, or a name in `launch/`; None: one process.
        quick: Skip the slow checks.
        as_json: Print JSON.

    Returns:
        Whether no check failed.
    """
    began, host = time.monotonic(), os.uname().nodename
    rendezvous, plan = None, None
    errors: list[CheckResult] = []
    checks = [check for check in _CHECKS if not (quick and check.slow)]
    try:
        job_nodes, node, address, port = detect_nodes()
        if job_nodes > 1:
            joined = rendezvous = network.rendezvous(node, job_nodes, address, port + _PORT_OFFSET)
            host = rendezvous.hosts[node]
            checks.insert(3, Check("nodes", lambda _: network.check_links(joined), 60, needs_plan=False))
    except UserError as error:
        errors.append(replace(failure_of(error), check="nodes", host=host))
    except (RuntimeError, OSError) as error:
        found = f"{address}:{port + _PORT_OFFSET}, the first node: {str(error).splitlines()[0]}"
        errors.append(CheckResult("nodes", "failure", found, "check that node and the network", host=host))
    try:
        facts = read_profile(assets.find("launch", profile, ".yaml")) if profile else {}
        limit_s = parse_slurm_time(time_limit) if time_limit else preemption.job_end_time() - time.time()
        if load is not None:
            nodes = nodes or (rendezvous.count if rendezvous else 1)
            elsewhere = "SLURM_JOB_ID" not in os.environ and (nodes > 1 or gpus or math.isfinite(limit_s))
            processes = gpus or int(facts.get("num_processes", 1))
            # Without a profile: as `captionscale train` on this machine.
            facts = facts or {"use_cpu": not gpus and not torch.cuda.is_available()}
            plan = Plan(load(), out, facts, nodes, processes, limit_s, not elsewhere, quick)
    except UserError as error:
        errors.append(replace(failure_of(error), check="config", host=host))

    results: list[CheckResult] = []
    prints = rendezvous is None or rendezvous.is_main
    console = SafeConsole()

    def add(new: list[CheckResult]) -> None:
        results.extend(new)
        for result in new if prints and not as_json else []:
            console.print(_line(result), soft_wrap=True)

    add(errors)
    for check in checks:
        if plan is not None or not check.needs_plan:
            with spinner(f"doctor: {check.name}", quiet=not prints):
                found_by_check = run_check(check, plan, host)
            add(found_by_check)
    if rendezvous is not None:
        add(rendezvous.gather([result for result in results if result.state != "ok"], _OTHERS_S))
    if prints and as_json:
        print(json.dumps(_document(results), indent=1))
    elif prints:
        print(f"{_summary(results)} ({time.monotonic() - began:.1f} s)")
    failed = verdict(results) == "failure"
    return not (rendezvous.share_verdict(failed, _OTHERS_S) if rendezvous else failed)


def _line(result: CheckResult) -> Text:
    text = Text.assemble(
        (f"{result.state:<8}", _STYLES[result.state] if result.measured else "dim"),
        f" {result.check:<10} {result.found}" + f"; {result.cure}" * bool(result.cure),
    )
    return text.append(f" [{result.host}]" if result.host and result.state != "ok" else "", "dim")


def _document(results: list[CheckResult]) -> dict[str, object]:
    """Return the JSON document that `docs/running.md` describes."""
    return {
        "format": FORMAT,
        "captionscale": __version__,
        "verdict": verdict(results),
        "results": [asdict(result) for result in results],
    }


def _summary(results: list[CheckResult]) -> str:
    unknown = sum(not result.measured and result.state == "ok" for result in results)
    counts = {state: sum(result.state == state for result in results) for state in _STYLES}
    summary = f"{counts['ok'] - unknown} ok" + f", {unknown} not measured" * bool(unknown)
    summary += f", {pluralize(counts['warning'], 'warning')}, {pluralize(counts['failure'], 'failure')}"
    return f"doctor: {summary}; the job {'would fail' if counts['failure'] else 'can start'}"
