"""Data-parallel training: two processes next to one, on this machine's CPU, over gloo.

Measured (docs/performance.md): 1.30 times as many images per second with the same batch, 1.79 times with
twice the batch.
"""

import argparse
import itertools
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from comparison import Candidate, Table, compare, run
from synthetic_run import add_config, change_train, load_config

from captionscale import subprocesses
from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.progress import console
from captionscale.train.loop import train_loop
from captionscale.train.setup import Run, build_run

_BATCHES = 4

Take = Callable[[int], float]


@dataclass(frozen=True)
class _Commanded(Run):
    """A run that takes steps on command, on the same batches in memory."""

    work: list[list[tuple[int, Batch]]]
    commands: Connection

    def steps_with_batches(self) -> Iterator[tuple[int, list[tuple[int, Batch]]]]:
        """Yield as many steps as each command asks for; answer with their processor time in seconds."""
        step = 0
        # The run ends with the process that commands it.
        with suppress(EOFError):
            while count := self.commands.recv():
                started = time.process_time()
                for _ in range(count):
                    yield step, self.work[step % len(self.work)]
                    step += 1
                self.commands.send(time.process_time() - started)


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Run the benchmark; return its tables."""
    parser = argparse.ArgumentParser("scale.py", description="Two training processes next to one.")
    add_config(parser)
    return run(
        _measure,
        parser,
        arguments,
        full={"rounds": 5, "steps": 4, "train": 320, "batch": None, "weak": True},
        quick={"rounds": 2, "steps": 4, "train": 320, "batch": None, "weak": True},
        tiny={"rounds": 1, "steps": 1, "train": 32, "batch": 4, "weak": False},
    )


def _measure(options: argparse.Namespace) -> Iterator[Table]:
    with tempfile.TemporaryDirectory(prefix="captionscale-bench-") as name:
        config, folder = load_config(options, Path(name), options.train), Path(name)
        images = options.batch or config.train.global_batch
        if options.batch:
            config = change_train(config, micro_batch=options.batch // 2)
        with (
            _processes(1, _endless(config, images), folder / "one") as one,
            _processes(2, _endless(config, images), folder / "strong") as strong,
        ):
            title = f"Strong scaling: {images:,} images per step"
            yield _compare(title, (strong, images), (one, images), options)
        if not options.weak:
            return
        with (
            _processes(1, _endless(config, images), folder / "one-again") as one,
            _processes(2, _endless(config, 2 * images), folder / "weak") as weak,
        ):
            title = f"Weak scaling: {images:,} images per step and process"
            yield _compare(title, (weak, 2 * images), (one, images), options)


def _compare(title: str, two: tuple[Take, int], one: tuple[Take, int], options: argparse.Namespace) -> Table:
    candidates = {"two processes": two, "one process": one}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}

    def take_steps(name: str) -> None:
        seconds[name].append(candidates[name][0](options.steps))

    table = compare(
        f"{title}, over gloo, one thread per process",
        "images",
        [
            Candidate(name, partial(take_steps, name), options.steps * count)
            for name, (_, count) in candidates.items()
        ],
        options.rounds,
    )
    # `compare` sees only this process's time, in which it waits. The first round warms up.
    for number, result in enumerate(table.results):
        result.cpu_ms = 1000 * median(seconds[result.name][1:]) / (options.steps * candidates[result.name][1])
        row = list(table.rows[number])
        table.rows[number] = [*row[:2], f"{result.cpu_ms:.2f}", row[3]]
    table.notes.append(f"Efficiency {table.results[1].ratio[0] / 2:.0%}. Batches come from memory.")
    return table


def _endless(config: Config, images: int) -> Config:
    """Return an experiment with a batch of so many images that never validates or saves."""
    never = 10**9
    return change_train(
        config, global_batch=images, steps=never, score_every=never, save_every=never, stall_s=1e6
    )


@contextmanager
def _processes(size: int, config: Config, run: Path) -> Iterator[Take]:
    """Start a run's processes as torchrun would.

    Yields:
        A function that takes so many steps and returns the processor time of all processes, in seconds.
    """
    run.mkdir()
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # All processes share one import of torch.
    context.set_forkserver_preload(["captionscale.train.loop"])
    ends: list[Connection] = []
    for rank in range(size):
        here, there = context.Pipe()
        context.Process(target=_train, args=(rank, size, port, config, run, there), daemon=True).start()
        there.close()
        ends.append(here)

    def take(steps: int) -> float:
        for end in ends:
            end.send(steps)
        return sum(map(_answer, ends))

    try:
        for end in ends:
            _answer(end)
        yield take
    finally:
        for end in ends:
            with suppress(OSError):
                end.send(0)
        for end in ends:
            # The other end is closed once the run's folder is no longer in use.
            with suppress(EOFError, OSError):
                end.recv()


def _answer(end: Connection) -> float:
    try:
        answer: float | UserError = end.recv()
    except EOFError:
        raise UserError("a training process ended, expected it to train; see its message above") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _train(rank: int, size: int, port: int, config: Config, run: Path, commands: Connection) -> None:
    subprocesses.end_with_pool()
    # Ctrl-C is for the commanding process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    console().quiet = True
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    # Without these, Accelerate gives each process a thread for every core.
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        with Ranks(config.train.precision) as ranks, ExitStack() as stack:
            training = build_run(config, run, ranks, stack)
            work = [share for _, share in itertools.islice(training.steps_with_batches(), _BATCHES)]
            commands.send(0.0)
            train_loop(_Commanded(**vars(training), work=work, commands=commands))
    except UserError as error:
        commands.send(error)


if __name__ == "__main__":
    main()
