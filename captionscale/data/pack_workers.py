"""Processes that write shards side by side."""

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
    """Yield each job and its shard as they come: first those that an earlier call finished.

    Args:
        jobs: In any order.
        workers: Processes; one does not leave this one, unless images are made smaller.

    Raises:
        UserError: As `write_shard`; a process was killed.
    """
    todo = []
    for job in jobs:
        if shard := load_finished(job):
            yield job, shard
        else:
            todo.append(job)
    resizes = any(job.short_side is not None for job in todo)
    if workers == 1 and not resizes:
        for job in todo:
            yield job, write_shard(job)
        return
    # A fork of this process would copy all records into every worker, as it counts references to them.
    # Workers are forks of a small server, which imports once for all: torch takes 500 MB and seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [write_shard.__module__, *(["captionscale.data.resize"] if resizes else [])]
    )
    # A Ctrl-C is for this process alone: who is forked while it ignores it, ignores it too.
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, ours)
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
            "pack: a worker process was killed or could not start, perhaps for want of memory;"
            " finished shards are kept; run the same command again, with fewer --workers"
        ) from None
    finally:
        # The shards in hand are finished, also after Ctrl-C: the same command goes on behind them.
        pool.shutdown(cancel_futures=True)


def _start(resizes: bool) -> None:
    """Make a worker process end with the one that started it, and take one core."""
    subprocesses.end_with_pool()
    if resizes:
        import torch

        torch.set_num_threads(1)
