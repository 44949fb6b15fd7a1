"""Ways of doing one thing, run in turn in one process, and how many times faster ours is."""

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from statistics import median

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from captionscale.files import cpu_count
from captionscale.progress import SafeConsole, progress
from captionscale.score.receipt import cpu_name

_SQUARE = 2048
"""Rows of the product whose pace is taken for the machine's best."""
_LIBRARIES = ("captionscale", "numpy", "pillow", "simplejpeg", "torch", "webdataset")


@dataclass(frozen=True)
class Way:
    """One way of doing a thing.

    Attributes:
        name: What a table calls it.
        run: Does it once.
        count: Things that a run does.
        after: Ends what a run has left going on; it is not measured.
        guarded: Whether `--check` guards the ratio; not one that says more of the machine than of ours.
    """

    name: str
    run: Callable[[], object]
    count: int
    after: Callable[[], object] = lambda: None
    guarded: bool = True


@dataclass
class Lane:
    """What was measured of one way.

    Attributes:
        name: Of the way.
        per_second: Things in a second of wall clock, for each round.
        cpu_ms: Processor time for each thing, in milliseconds, child processes included; the rounds' median.
        ratio: The first way's pace by this one's in the same round: median, least, greatest.
        guarded: Of the way.
    """

    name: str
    per_second: list[float]
    cpu_ms: float
    ratio: tuple[float, float, float]
    guarded: bool = True


@dataclass
class Heat:
    """A table of ways that were run in turn.

    Attributes:
        title: What was done.
        unit: What was counted, such as `images`.
        lanes: The first is ours.
        notes: What else was found, a sentence each.
    """

    title: str
    unit: str
    lanes: list[Lane]
    notes: list[str] = field(default_factory=list)

    def sheet(self) -> "Sheet":
        """Return what people are shown of it."""
        columns = (
            "way",
            f"{self.unit}/s",
            f"CPU ms/{self.unit.removesuffix('s')}",
            "ours is ... times as fast",
        )
        rows: list[Sequence[str | int | float]] = []
        for lane in self.lanes:
            middle, least, greatest = lane.ratio
            ratio = "" if lane is self.lanes[0] else f"{middle:.2f} ({least:.2f} to {greatest:.2f})"
            rows.append((lane.name, f"{median(lane.per_second):,.0f}", f"{lane.cpu_ms:.2f}", ratio))
        return Sheet(self.title, columns, rows, self.notes, self.unit, self.lanes)


@dataclass
class Sheet:
    """A table, as people are shown it.

    Attributes:
        title: What was measured.
        columns: Their names, with units.
        rows: A value for each column.
        notes: What else was found, a sentence each.
        unit: What was counted, if ways were run in turn.
        lanes: These ways, the first of them ours.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str | int | float]]
    notes: list[str] = field(default_factory=list)
    unit: str = ""
    lanes: list[Lane] = field(default_factory=list)

    def print(self, out: SafeConsole) -> None:
        """Print it for people."""
        table = Table(title=self.title, title_justify="left", caption="\n".join(self.notes) or None)
        for name in self.columns:
            table.add_column(name, justify="left" if name == self.columns[0] else "right")
        for row in self.rows:
            table.add_row(*(value if isinstance(value, str) else f"{value:,}" for value in row))
        out.print(table)


@contextmanager
def one_core() -> Iterator[None]:
    """Let torch compute on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def race(title: str, unit: str, ways: Sequence[Way], rounds: int, *, by_cpu: bool = False) -> Heat:
    """Run ways A B A B ... and compare them round by round, so that a slow minute slows all of them.

    Args:
        title: Of the table.
        unit: What is counted.
        ways: The first is ours; each is run once more than is measured, to warm up.
        rounds: That are measured.
        by_cpu: Compare processor time on one core, not wall clock.
    """
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    cores_used = one_core() if by_cpu else nullcontext()
    with cores_used, progress(title, (rounds + 1) * len(ways), transient=True) as bar:
        for turn in range(rounds + 1):
            for way in ways:
                gc.collect()
                cpu, wall = _cpu(), time.perf_counter()
                way.run()
                wall, cpu = time.perf_counter() - wall, _cpu() - cpu
                way.after()
                if turn:
                    seconds[way.name].append((wall, cpu))
                bar.advance()
    lanes = []
    pace: dict[str, list[float]] = {
        way.name: [way.count / (cpu if by_cpu else wall) for wall, cpu in seconds[way.name]] for way in ways
    }
    for way in ways:
        ratios = [ours / other for ours, other in zip(pace[ways[0].name], pace[way.name], strict=True)]
        cpu_ms = median(cpu for _, cpu in seconds[way.name]) / way.count * 1000
        ratio = (median(ratios), min(ratios), max(ratios))
        lanes.append(Lane(way.name, pace[way.name], cpu_ms, ratio, way.guarded))
    return Heat(title, unit, lanes)


def limit(run: Callable[[], object], cpu_ms: float, precision: torch.dtype = torch.float32) -> str:
    """Return what share of its processor time a run's products would take at the machine's best pace.

    Args:
        run: Of torch's operations.
        cpu_ms: That it takes.
        precision: Of its products.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    square = torch.randn(_SQUARE, _SQUARE).to(precision)
    laps = []
    with one_core():
        for _ in range(5):
            start = time.process_time()
            square @ square
            laps.append(time.process_time() - start)
    gflop, pace = counter.get_total_flops() / 1e9, 2 * _SQUARE**3 / min(laps) / 1e9
    least_ms = gflop / pace * 1000
    return (
        f"The limit: {gflop:,.0f} GFLOP of products at the {pace:,.0f} GFLOP/s of one of {_SQUARE:,}^3 take"
        f" {least_ms:,.0f} ms of processor time, {100 * least_ms / cpu_ms:.0f} % of ours."
    )


def show(bench: str, tables: Sequence[Heat | Sheet], *, as_json: bool) -> None:
    """Print what was measured, for people or for machines.

    Args:
        bench: The benchmark's name.
        tables: In the order to be shown.
        as_json: Of every benchmark alike: `machine`, and `tables`, each with `bench` and the fields of
            `Sheet`.
    """
    sheets = [table.sheet() if isinstance(table, Heat) else table for table in tables]
    machine = {
        "processor": cpu_name(),
        "cores": cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }
    if as_json:
        trees = [{"bench": bench} | asdict(sheet) for sheet in sheets]
        print(json.dumps({"machine": machine, "tables": trees}, indent=1))
        return
    out = SafeConsole()
    for sheet in sheets:
        sheet.print(out)
    out.print("; ".join(f"{key} {value}" for key, value in machine.items()), soft_wrap=True)


def _cpu() -> float:
    # Of this process to the nanosecond: the system's own count has ticks of 10 ms.
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
