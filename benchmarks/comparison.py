"""Candidates for one task, run in turn in one process, and how many times as fast the first one is."""

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from rich.table import Table as RichTable
from torch.utils.flop_counter import FlopCounterMode

from captionscale.errors import UserError
from captionscale.machine import cpu_count, cpu_name
from captionscale.progress import SafeConsole, progress

_MATRIX = 2048
"""Rows of the matrices whose product gives the machine's best rate."""
_LIBRARIES = ("captionscale", "numpy", "pillow", "simplejpeg", "torch", "webdataset")


@dataclass(frozen=True)
class Candidate:
    """One way to do the task.

    Attributes:
        name: For the table.
        run: Does the task once.
        count: Items that a run processes.
        after: Finishes what a run leaves in the background; not measured.
    """

    name: str
    run: Callable[[], object]
    count: int
    after: Callable[[], object] = lambda: None


@dataclass
class Result:
    """Measurements of a candidate.

    Attributes:
        name: The candidate's.
        per_second: Items per second of wall clock (of processor time, if that is compared), by round.
        cpu_ms: Processor time per item, child processes included, in milliseconds; median of the rounds.
        ratio: Rate of the first candidate divided by this one's in the same round: median, minimum, maximum.
    """

    name: str
    per_second: list[float]
    cpu_ms: float
    ratio: tuple[float, float, float]


@dataclass
class Table:
    """A table of measurements.

    Attributes:
        title: What was measured.
        columns: Names, with units.
        rows: A value for each column.
        notes: Other findings, a sentence each.
        results: Of the candidates, ours first, if the table is a comparison.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str | int | float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def print(self, console: SafeConsole) -> None:
        """Print it."""
        table = RichTable(title=self.title, title_justify="left", caption="\n".join(self.notes) or None)
        for name in self.columns:
            table.add_column(name, justify="left" if name == self.columns[0] else "right")
        for row in self.rows:
            table.add_row(*(value if isinstance(value, str) else f"{value:,}" for value in row))
        console.print(table)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(
    title: str, unit: str, candidates: Sequence[Candidate], rounds: int, *, by_cpu: bool = False
) -> Table:
    """Run candidates A B A B ... and compare them round by round, so that a slow minute slows all of them.

    Args:
        title: The table's.
        unit: What is counted, such as `images`.
        candidates: Ours first. Each runs once more than is measured, to warm up.
        rounds: To measure.
        by_cpu: Compare processor time of one thread instead of wall clock.
    """
    seconds: dict[str, list[tuple[float, float]]] = {each.name: [] for each in candidates}
    threads = one_thread() if by_cpu else nullcontext()
    with threads, _frozen(), progress(title, (rounds + 1) * len(candidates), transient=True) as bar:
        for number in range(rounds + 1):
            for candidate in candidates:
                gc.collect()
                cpu, wall = _cpu(), time.perf_counter()
                candidate.run()
                wall, cpu = time.perf_counter() - wall, _cpu() - cpu
                candidate.after()
                if number:
                    seconds[candidate.name].append((wall, cpu))
                bar.advance()
    columns = ("candidate", f"{unit}/s", f"CPU ms/{unit.removesuffix('s')}", "ours is ... times as fast")
    table = Table(title, columns)
    rates = {
        each.name: [each.count / (cpu if by_cpu else wall) for wall, cpu in seconds[each.name]]
        for each in candidates
    }
    for each in candidates:
        ratios = [
            ours / other for ours, other in zip(rates[candidates[0].name], rates[each.name], strict=True)
        ]
        cpu_ms = median(cpu for _, cpu in seconds[each.name]) / each.count * 1000
        result = Result(each.name, rates[each.name], cpu_ms, (median(ratios), min(ratios), max(ratios)))
        table.results.append(result)
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*result.ratio) if table.rows else ""
        table.rows.append((each.name, f"{median(result.per_second):,.0f}", f"{cpu_ms:.2f}", ratio))
    return table


@contextmanager
def _frozen() -> Iterator[None]:
    """Spare the collections between runs what was there before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def product_bound(run: Callable[[], object], cpu_ms: float, precision: torch.dtype = torch.float32) -> str:
    """Return the share of a run's processor time that its matrix products need at the machine's best rate.

    Args:
        run: Torch operations.
        cpu_ms: Processor time of a run, in milliseconds.
        precision: Of its products.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    gflop, rate = counter.get_total_flops() / 1e9, _best_gflops(precision)
    least_ms = gflop / rate * 1000
    return (
        f"Lower bound: {gflop:,.0f} GFLOP of products at {rate:,.0f} GFLOP/s ({_MATRIX:,}^3) take"
        f" {least_ms:,.0f} ms of processor time, {100 * least_ms / cpu_ms:.0f} % of ours."
    )


@cache
def _best_gflops(precision: torch.dtype) -> float:
    matrix = torch.randn(_MATRIX, _MATRIX).to(precision)
    seconds = []
    with one_thread():
        for _ in range(3):
            start = time.process_time()
            matrix @ matrix
            seconds.append(time.process_time() - start)
    return 2 * _MATRIX**3 / min(seconds) / 1e9


def run(
    measure: Callable[[argparse.Namespace], Iterable[Table]],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    *,
    full: Mapping[str, Any],
    quick: Mapping[str, Any],
    tiny: Mapping[str, Any],
) -> list[Table]:
    """Parse the command line, measure, and print the tables.

    Args:
        measure: The benchmark.
        parser: Its own options.
        arguments: Of the command line; None: sys.argv.
        full: Sizes by default, as attributes of the namespace; `rounds` among them.
        quick: Sizes with --quick, for a minute or so.
        tiny: Sizes with --tiny, which tests that the benchmark works and measures nothing.
    """
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const=quick, dest="size", help="small: about a minute")
    size.add_argument("--tiny", action="store_const", const=tiny, dest="size", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, metavar="N", help=f"of each table (default: {full['rounds']})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(size=full)
    options = parser.parse_args(arguments)
    for key, value in options.size.items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    machine = {"processor": cpu_name(), "cores": cpu_count(), "python": platform.python_version()}
    machine |= {name: version(name) for name in _LIBRARIES}
    console, tables = SafeConsole(), []
    try:
        for table in measure(options):
            tables.append(table)
            if not options.json:
                table.print(console)
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    if options.json:
        print(json.dumps({"machine": machine, "tables": [asdict(each) for each in tables]}, indent=1))
    else:
        console.print("; ".join(f"{key} {value}" for key, value in machine.items()), soft_wrap=True)
    return tables


def _cpu() -> float:
    # os.times has ticks of 10 ms; of this process, process_time has nanoseconds.
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
