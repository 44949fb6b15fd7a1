"""The command `doctor`: check whether a job will work, before it is submitted and when it starts."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from captionscale import assets
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.progress import SafeConsole, spinner
from captionscale.tools.doctor import machine, network, storage, throughput
from captionscale.tools.doctor.network import Rendezvous
from captionscale.tools.doctor.plan import Plan, parse_slurm_time
from captionscale.tools.doctor.report import Check, CheckResult, document, failure_of, run_checks, verdict
from captionscale.tools.launcher import detect_nodes
from captionscale.tools.profiles import pluralize, read_profile
from captionscale.train import preemption

_STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}
_PORT_AFTER = 1000
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
    began, host, lines = time.monotonic(), os.uname().nodename, []
    show = _printer(as_json)
    rendezvous = None
    try:
        job_nodes, node, address, port = detect_nodes()
        if job_nodes > 1:
            rendezvous = network.rendezvous(node, job_nodes, address, port + _PORT_AFTER)
            host = rendezvous.hosts[node]
    except UserError as error:
        lines.append(replace(failure_of(error), check="nodes", host=host))
    except (RuntimeError, OSError) as error:
        found = f"{address}:{port + _PORT_AFTER}, the first node: {str(error).splitlines()[0]}"
        lines.append(CheckResult("nodes", "failure", found, "check that node and the network", host=host))
    plan = None
    try:
        facts = read_profile(assets.find("launch", profile, ".yaml")) if profile else {}
        left_s = preemption.job_end_time() - time.time()
        limit = parse_slurm_time(time_limit) if time_limit else left_s if math.isfinite(left_s) else None
        if load is not None:
            plan = _plan(
                load(), out, nodes or (rendezvous.count if rendezvous else 1), gpus, facts, limit, quick
            )
    except UserError as error:
        lines.append(replace(failure_of(error), check="config", host=host))
    prints = rendezvous is None or rendezvous.is_main
    for line in lines:
        show(line)
    for check in _checks(plan, rendezvous, quick):
        with spinner(f"doctor: {check.name}", quiet=not prints):
            results = list(run_checks([check], host))
        for line in results:
            lines.append(line)
            if prints:
                show(line)
    if rendezvous is not None:
        problems = [asdict(line) for line in lines if line.state != "ok"]
        for each in rendezvous.gather(problems, _OTHERS_S):
            lines.append(CheckResult(**each))  # type: ignore[arg-type]
            show(lines[-1])
    if prints:
        _print_summary(lines, as_json, time.monotonic() - began)
    failed = verdict(lines) == "failure"
    return not (rendezvous.share_verdict(failed, _OTHERS_S) if rendezvous else failed)


def _plan(
    settings: Config,
    out: Path | None,
    nodes: int,
    gpus: int | None,
    facts: Mapping[str, Any],
    limit_s: float | None,
    quick: bool,
) -> Plan:
    in_job = "SLURM_JOB_ID" in os.environ
    local_processes = gpus or int(facts.get("num_processes", 1))
    # Without a profile: as `captionscale train` on this machine.
    facts = facts or {"use_cpu": not gpus and not torch.cuda.is_available()}
    elsewhere = not in_job and (nodes > 1 or gpus is not None or limit_s is not None)
    return Plan(settings, out, facts, nodes, local_processes, limit_s, not elsewhere, quick)


def _checks(plan: Plan | None, rendezvous: Rendezvous | None, quick: bool) -> list[Check]:
    """Return the checks, the fast ones first."""
    slow = 90.0
    checks = [
        Check("versions", lambda: machine.versions(plan), 10),
        Check("gpus", lambda: machine.gpus(plan), 30),
        Check("java", lambda: machine.java(plan), 30),
    ]
    if rendezvous is not None:
        checks.append(Check("nodes", lambda: network.check_links(rendezvous), 60))
    if plan is not None:
        checks += [
            Check("workers", lambda: machine.workers(plan), 10),
            Check("shards", lambda: storage.shards(plan), 30),
            Check("batches", lambda: storage.batches(plan), 30),
            Check("weights", lambda: storage.weights(plan), 30),
            Check("disk", lambda: storage.disk(plan), 45),
        ]
        if plan.run is not None and not quick:
            checks.append(Check("run", lambda: storage.run(plan), slow))
        if not quick:
            checks.append(Check("loading", lambda: throughput.loading(plan), slow))
        checks.append(Check("finish", lambda: throughput.finish(plan), slow))
    if not quick:
        checks.append(Check("evaluator", lambda: machine.evaluator(plan), slow))
    return checks


def _printer(as_json: bool) -> Callable[[CheckResult], None]:
    """Return what prints each result at once, unless a table or JSON follows."""
    if as_json or sys.stdout.isatty():
        return lambda _: None
    return lambda line: print(_plain(line), flush=True)


def _plain(line: CheckResult) -> str:
    text = f"{line.state:<8} {line.check:<10} {line.found}" + (f"; {line.cure}" if line.cure else "")
    return text if not line.host or line.state == "ok" else f"{text} [{line.host}]"


def _print_summary(lines: list[CheckResult], as_json: bool, took_s: float) -> None:
    if as_json:
        print(json.dumps(document(lines), indent=1))
        return
    several = len({line.host for line in lines}) > 1
    if sys.stdout.isatty():
        out = SafeConsole()
        table = Table(show_lines=False, pad_edge=False)
        for heading in ("", "check", "result, and what to do"):
            table.add_column(heading, overflow="fold")
        for line in lines:
            style = _STYLES[line.state] if line.measured else "dim"
            table.add_row(_mark(line, style), line.check, _cell(line, several))
        out.print(table)
    unknown = sum(line.state == "ok" and not line.measured for line in lines)
    counts = {state: sum(line.state == state for line in lines) for state in _STYLES}
    summary = f"{counts['ok'] - unknown} ok" + f", {unknown} not measured" * bool(unknown)
    summary += f", {pluralize(counts['warning'], 'warning')}, {pluralize(counts['failure'], 'failure')}"
    ending = {"ok": "the job can start", "warning": "the job can start", "failure": "the job would fail"}
    print(f"doctor: {summary}; {ending[verdict(lines)]} ({took_s:.1f} s)")


def _mark(line: CheckResult, style: str) -> Text:
    return Text(line.state if line.measured else "-", style)


def _cell(line: CheckResult, several: bool) -> Text:
    """Return the result, the cure, and the node if there are several."""
    text = Text(line.found, "" if line.measured else "dim")
    if line.cure:
        text.append(f"\n-> {line.cure}", "bold")
    if line.state != "ok" and several:
        text.append(f"  [{line.host}]", "dim")
    return text
