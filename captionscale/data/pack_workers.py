"""Parallel processes that write shards."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import forkserver

from captionscale import subprocesses
from captionscale.data.shard_writer import ShardJob, WrittenShard, load_finished, write_shard
from captionscale.errors import UserError


def write_shards(jobs: Sequence[ShardJob], workers: int) -> Iterator[tuple[ShardJob, WrittenShard]]:
    """Yield jobs and their shards as they finish, those of an earlier call first.

    One worker is this process, unless images are resized.
    """
    todo = []
    for job in jobs:
        if shard := load_finished(job):
            yield job, shard
        else:
            todo.append(job)
    resizes = any(job.images.short_side is not None for job in todo)
    if workers == 1 and not resizes:
        for job in todo:
            yield job, write_shard(job)
        return
    # Forks of this process would copy all records, whose reference counts change. Workers are forks of a
    # small server that imports torch (500 MB, seconds) once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([write_shard.__module__, *["captionscale.data.resize"] * resizes])
    # Workers inherit the ignored SIGINT: Ctrl-C stops only this process.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, previous)
    pool = ProcessPoolExecutor(min(workers, len(todo)) or 1, context, _start, (resizes,))
    waiting: dict[Future[WrittenShard], ShardJob] = {}
    remaining = iter(todo)
    try:
        while True:
            for job in islice(remaining, 2 * workers - len(waiting)):
                waiting[pool.submit(write_shard, job)] = job
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except (BrokenProcessPool, MemoryError):
        raise UserError(
            "pack: a worker process was killed or could not start, perhaps out of memory;"
            " finished shards are kept; run the same command again, with fewer --workers"
        ) from None
    finally:
        # Running jobs finish, also after Ctrl-C: the same command resumes after them.
        pool.shutdown(cancel_futures=True)


def _start(resizes: bool) -> None:
    """Initialize a worker: it ends with its parent, and torch uses one core."""
    subprocesses.end_with_pool()
    if resizes:
        import torch

        torch.set_num_threads(1)
