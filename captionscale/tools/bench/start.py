"""`captionscale bench start`: what a process costs before it works, and how two of them share the cores."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np
from torch.utils.data import DataLoader, Dataset

from captionscale import subprocesses
from captionscale.config import Data
from captionscale.data import packing, synthetic
from captionscale.data.loader import Batch, Loader
from captionscale.data.sampler import BatchSampler
from captionscale.data.shards import Split
from captionscale.data.sources import coco
from captionscale.files import cpu_count
from captionscale.progress import progress
from captionscale.tools.bench.race import Heat, Sheet, Way, race
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary

_IMAGES, _BATCH = 64, 32
_SHARDS = 118
"""Of 1,000 images each: COCO's train2017."""

# What a handler imports, and the functions of its floor that it calls; `pack` asks its first kind.
_VERB = """
import ast, inspect, sys, textwrap, time
from captionscale.commands.parser import parser

def below(parsers):
    return next((action.choices for action in parsers._actions if isinstance(action.choices, dict)), {})

def imports(function, seen):
    seen.add(function)
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield ast.unparse(node)
    for name in function.__code__.co_names:
        other = function.__globals__.get(name)
        if inspect.isfunction(other) and "captionscale.commands" in other.__module__ and other not in seen:
            yield from imports(other, seen)

verbs = below(parser())
if len(sys.argv) < 2:
    print(*verbs)
else:
    verb = verbs[sys.argv[1]]
    handler = verb.get_default("handler") or [*below(verb).values()][0].get_default("handler")
    lines = [*dict.fromkeys(imports(handler, set()))]
    start = time.perf_counter()
    for line in lines:
        exec(line)
    print(time.perf_counter() - start, "torch" in sys.modules)
"""

# A recurrent network takes many small steps, at each of which all threads of a process have to meet.
_STEPS = """
import sys, torch
cell, words = torch.nn.LSTMCell(512, 512), torch.nn.Linear(512, 2000)
picture = torch.randn(32, 512)
print(torch.get_num_threads(), flush=True)
for steps in map(int, sys.stdin):
    state, loss = None, 0
    for _ in range(steps):
        state = cell(picture, state)
        loss = loss + words(state[0]).logsumexp(1).sum()
    torch.autograd.backward(loss)
    print("done", flush=True)
"""
_STEPS_OF_A_RUN = 10


class _Pictures(Dataset[np.ndarray]):
    """What a loader's worker process holds at the least."""

    def __init__(self, split: Split):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: int) -> np.ndarray:
        return np.zeros((3, 224, 224), np.uint8)


def bench(*, rounds: int) -> list[Heat | Sheet]:
    """Measure starts.

    Args:
        rounds: Of each table.
    """
    with tempfile.TemporaryDirectory(prefix="captionscale-bench-") as name:
        split = _drawn(Path(name))
        return [_verbs(rounds), _first_batches(split, rounds), _memory(split), _two_processes(rounds)]


def _drawn(folder: Path) -> Split:
    synthetic.write_coco(folder / "coco", counts={"train": _IMAGES}, size=256)
    captions = folder / "coco" / "annotations" / "captions_train2017.json"
    records = coco.read_official(folder / "coco" / "train2017", captions, "train")
    packing.pack(records, folder / "shards", sources=[captions], options=packing.PackOptions())
    return Split(folder / "shards", "train")


def _verbs(rounds: int) -> Sheet:
    """Start the command line as a user does, and import in a new process what a command's handler imports."""
    names = _python("-c", _VERB).split()
    helps: dict[str, list[float]] = {name: [] for name in ("", *names)}
    imports: dict[str, list[float]] = {name: [] for name in names}
    torch: set[str] = set()
    with progress("starts of commands", rounds * (len(helps) + len(names)), transient=True) as bar:
        for _ in range(rounds):
            for name, times in helps.items():
                began = time.perf_counter()
                _python("-m", "captionscale", *name.split(), "--help")
                times.append(time.perf_counter() - began)
                bar.advance()
            for name, times in imports.items():
                seconds, with_torch = _python("-c", _VERB, name).split()
                times.append(float(seconds))
                torch |= {name} if with_torch == "True" else set()
                bar.advance()
    rows: list[tuple[str | float, ...]] = [
        (
            f"captionscale {name}".strip(),
            round(median(times), 2),
            round(min(times), 2),
            round(median(imports[name]), 2) if name else "",
            "yes" if name in torch else "",
        )
        for name, times in helps.items()
    ]
    columns = ("command", "--help, s (median)", "--help, s (least)", "its imports, s (median)", "torch")
    notes = ["Imports are those of the command's own floor; what it needs only at times comes later."]
    if sys.dont_write_bytecode:
        notes.append("PYTHONDONTWRITEBYTECODE is set: Python compiles anew what it finds no bytecode of.")
    return Sheet("Starts of commands", columns, list(rows), notes)


def _python(*arguments: str) -> str:
    done = subprocesses.run([sys.executable, *arguments])
    done.check_returncode()
    return done.stdout


def _first_batches(split: Split, rounds: int) -> Heat:
    """Find out what comes first in a run, and read it: at an epoch's beginning, and near its end."""

    def start(share: float) -> None:
        order = BatchSampler((1000,) * _SHARDS, 0, 8 * _BATCH, _BATCH, 4)
        _, items = order.micro_batches(int(share * order.steps_per_epoch), 0, 1)[0]
        _first_batch(split, items % len(split))

    ways = [Way("resumed at 90 % of an epoch", lambda: start(0.9), 1), Way("fresh", lambda: start(0.0), 1)]
    heat = race(f"First batch, {1000 * _SHARDS:,} images in an epoch", "starts", ways, rounds)
    heat.notes.append("BatchSampler of the epoch, the loader's threads, and a batch of 32 images.")
    return heat


def _first_batch(split: Split, items: np.ndarray, workers: int = 2) -> tuple[Loader, Batch]:
    data = Data.model_validate({"shards": str(split.storage), "workers": workers})
    loader = Loader(split, Vocabulary(SPECIAL_TOKENS), data)
    batch = next(loader.prefetch([(items, 0)]))
    loader.close()
    return loader, batch


def _memory(split: Split) -> Sheet:
    """Compare threads, which share a process, with worker processes, which have the same imports."""
    items = np.arange(_BATCH)
    _first_batch(split, items)
    rows: list[tuple[str | int, ...]] = []
    for count in (1, 2):
        before = _megabytes()
        kept = _first_batch(split, items, count)
        rows.append((f"captionscale, {count} threads", _megabytes() - before))
        del kept
    for count in (1, 2):
        before = _megabytes()
        workers = iter(DataLoader(_Pictures(split), _BATCH, num_workers=count, persistent_workers=True))
        next(workers)
        rows.append((f"a DataLoader, {count} worker processes", _megabytes() - before))
        del workers
    notes = [
        f"Proportional set size, with a batch of {_BATCH} pictures ({_BATCH * 3 * 224 * 224 / 1e6:.0f} MB).",
        "The DataLoader's workers do no work: they are forks of this process, at rest.",
    ]
    return Sheet("Memory that a loader adds", ("", "MB"), list(rows), notes)


def _megabytes() -> int:
    """Return what this process and its children hold, what several share counted once."""
    own = os.getpid()
    children, total = list[int](), 0
    for task in Path(f"/proc/{own}/task").iterdir():
        # A thread may end at any time.
        with suppress(OSError):
            children += map(int, (task / "children").read_text().split())
    for process in (own, *children):
        with suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total // 1000


def _two_processes(rounds: int) -> Heat:
    """Let two processes work side by side, with the threads of `captionscale launch`, and torch's own."""
    counts: list[str] = []
    with ExitStack() as stack:
        ways = []
        for name, settings in (
            ("as `captionscale launch` sets them", {"OMP_NUM_THREADS": str(max(1, cpu_count() // 2))}),
            ("torch's own number, asleep while they wait", {"OMP_WAIT_POLICY": "passive"}),
            ("torch's own", {}),
        ):
            pair = [stack.enter_context(_worker(settings)) for _ in range(2)]
            counts += [worker.stdout.readline().strip() for worker in pair if worker.stdout]

            def run(pair: list[subprocess.Popen[str]] = pair) -> None:
                for worker in pair:
                    if worker.stdin:
                        worker.stdin.write(f"{_STEPS_OF_A_RUN}\n")
                        worker.stdin.flush()
                for worker in pair:
                    if worker.stdout:
                        worker.stdout.readline()

            ways.append(Way(name, run, 2 * _STEPS_OF_A_RUN, guarded=False))
        heat = race("Two processes side by side", "steps", ways, rounds)
    heat.notes += [
        f"On {cpu_count()} cores; threads of the six processes: {', '.join(counts)}. Those of one process wait",
        "for each other at each operation, and spin while they wait.",
    ]
    return heat


@contextmanager
def _worker(settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= settings
    with subprocesses.start(
        [sys.executable, "-c", _STEPS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as worker:
        try:
            yield worker
        finally:
            worker.kill()
