"""`captionscale bench scale`: two processes beside one, here, and what a cluster is predicted to do."""

import itertools
import math
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from captionscale import subprocesses, toml
from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.progress import console
from captionscale.tools.bench.cluster import Work, predict
from captionscale.tools.bench.race import Heat, Sheet, Way, race
from captionscale.tools.bench.save import WORDS
from captionscale.tools.bench.step import drawn
from captionscale.train.loop import train_loop
from captionscale.train.setup import Run, build_run

_STEPS, _BATCHES = 4, 4

Take = Callable[[int], float]


@dataclass(frozen=True)
class _Waiting(Run):
    """A run that takes steps when it is told to, on the same batches again and again, from memory."""

    work: list[list[tuple[int, Batch]]]
    orders: Connection

    def steps_with_batches(self) -> Iterator[tuple[int, list[tuple[int, Batch]]]]:
        """Yield as many steps as each order wants; answer with their seconds of processor time."""
        step = 0
        # If who orders is gone, the run ends.
        with suppress(EOFError):
            while wanted := self.orders.recv():
                began = time.process_time()
                for _ in range(wanted):
                    yield step, self.work[step % len(self.work)]
                    step += 1
                self.orders.send(time.process_time() - began)


def bench(
    config: Config | None, *, step_ms: float | None, gpu: str | None, rounds: int
) -> list[Heat | Sheet]:
    """Measure one and two processes, and predict 1 to 128 nodes.

    Args:
        config: The experiment; None: that of quickstart, on drawn pictures.
        step_ms: Milliseconds that one GPU takes for a step of one micro-batch, in place of measuring here.
        gpu: What the tables call that GPU.
        rounds: Of a few steps each.

    Raises:
        UserError: As `train`; too few micro-batches for two processes; a time that is none.
    """
    if gpu and step_ms is None:
        raise UserError(
            f"--gpu-name {gpu}: without --step-ms nothing is predicted of a GPU; give its time too"
        )
    if step_ms is not None:
        return [*_of_gpu(config or toml.load("quickstart"), step_ms, gpu or "a GPU")]
    with tempfile.TemporaryDirectory(prefix="captionscale-bench-") as name:
        return _measured(config or drawn(Path(name)), Path(name), rounds)


def _of_gpu(config: Config, step_ms: float, gpu: str) -> list[Sheet]:
    if not (math.isfinite(step_ms) and step_ms > 0):
        raise UserError(
            f"--step-ms {step_ms:g}: wanted the milliseconds of one micro-batch: those that bench step tells"
            " of a step, divided by its micro-batches"
        )
    learning = _learning(Captioner(config.model, WORDS))
    work = Work(step_ms / 1000, config.train.micro_batch, learning)
    return predict(work, f"on {gpu}, as it was told")


def _learning(captioner: Captioner) -> int:
    return sum(each.numel() for each in captioner.parameters() if each.requires_grad)


def _measured(config: Config, folder: Path, rounds: int) -> list[Heat | Sheet]:
    images = config.train.global_batch
    with (
        _processes(1, _changed(config, images), folder / "one") as (one, learning),
        _processes(2, _changed(config, images), folder / "strong") as (strong, _),
        _processes(2, _changed(config, 2 * images), folder / "weak") as (weak, _),
    ):
        heats = [
            _race(f"Strong scaling: {images:,} images a step", strong, one, images, images, rounds),
            _race(
                f"Weak scaling: {images:,} images a step for each process",
                weak,
                one,
                2 * images,
                images,
                rounds,
            ),
        ]
    # Of one process, which has one thread: another program's share of the core is not the model's.
    image_s = median(heat.lanes[1].cpu_ms for heat in heats) / 1000
    work = Work(config.train.micro_batch * image_s, config.train.micro_batch, learning)
    return [*heats, *predict(work, "measured above, on one core: give a GPU's by --step-ms")]


def _race(title: str, two: Take, one: Take, images: int, images_of_one: int, rounds: int) -> Heat:
    ways = {"two processes": (two, images), "one process": (one, images_of_one)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    heat = race(
        f"Measured, over gloo, one thread each. {title}",
        "images",
        [
            Way(name, partial(_take, take, seconds[name]), _STEPS * count, guarded=False)
            for name, (take, count) in ways.items()
        ],
        rounds,
    )
    for lane in heat.lanes:
        # The race saw this process's own time only, in which it waits. The first round is its warm-up.
        lane.cpu_ms = 1000 * median(seconds[lane.name][1:]) / (_STEPS * ways[lane.name][1])
    heat.notes.append(f"Efficiency {heat.lanes[1].ratio[0] / 2:.0%}. Batches come from memory.")
    return heat


def _take(take: Take, seconds: list[float]) -> None:
    seconds.append(take(_STEPS))


def _changed(config: Config, images: int) -> Config:
    """Return an experiment of so many images a step that only ever takes steps."""
    never = 10**9
    changes = {
        "global_batch": images,
        "steps": never,
        "score_every": never,
        "save_every": never,
        "stall_s": 1e6,
    }
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


@contextmanager
def _processes(size: int, config: Config, run: Path) -> Iterator[tuple[Take, int]]:
    """Start a run's processes as torchrun would.

    Returns:
        What lets them take so many steps, and returns their seconds of processor time together; and how many
        numbers learn.
    """
    run.mkdir()
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # One import of torch for all of them.
    context.set_forkserver_preload([__name__])
    ends: list[Connection] = []
    for rank in range(size):
        here, there = context.Pipe()
        context.Process(target=_work, args=(rank, size, port, config, run, there), daemon=True).start()
        there.close()
        ends.append(here)

    def take(steps: int) -> float:
        for end in ends:
            end.send(steps)
        return sum(map(_answer, ends))

    try:
        yield take, int(max([_answer(end) for end in ends]))
    finally:
        for end in ends:
            with suppress(OSError):
                end.send(0)
        for end in ends:
            # It closes its own when it has left its folder.
            with suppress(EOFError, OSError):
                end.recv()


def _answer(end: Connection) -> float:
    try:
        answer: float | UserError = end.recv()
    except EOFError:
        raise UserError("bench scale: a process has ended, wanted two that train; it told why") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _work(rank: int, size: int, port: int, config: Config, run: Path, orders: Connection) -> None:
    """Be a process of a run."""
    subprocesses.end_with_pool()
    # A Ctrl-C is for the process that asks; what a run says is of no interest.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    console().quiet = True
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    # Without these, Accelerate gives each process a thread for every core.
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        with Ranks(config.train.precision) as ranks, ExitStack() as stack:
            job = build_run(config, run, ranks, stack)
            work = [share for _, share in itertools.islice(job.steps_with_batches(), _BATCHES)]
            orders.send(float(_learning(job.captioner)))
            train_loop(_Waiting(**vars(job), work=work, orders=orders))
    except UserError as error:
        orders.send(error)
