"""Checks of throughput: loading against the training step, and the run against the job's time limit."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from statistics import median

import numpy as np
import torch

from captionscale.data.loader import Batch, Loader
from captionscale.distributed.engine import create_engine
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.encoders.encoder import interpolation_of
from captionscale.progress import format_duration
from captionscale.tools.doctor.plan import Plan
from captionscale.tools.doctor.report import CheckResult, failure, ok, skipped, warning
from captionscale.train.log_reader import read_metric
from captionscale.train.objective import CrossEntropyObjective
from captionscale.train.optimizer import make_optimizer
from captionscale.train.run_folder import LOG_FILE, checkpoint_steps
from captionscale.train.step import training_step

_LOAD_S = 4.0
_STEPS, _STEPS_S = 4, 12.0
_PICTURES_ON_CPU = 4
_ENOUGH = 1.1
"""Factor above the throughput of a step, as loading is uneven."""
_RECENT = 20


@cache
def _loaded(plan: Plan) -> float:
    """Return the images per second that one process loads."""
    interpolation = interpolation_of(plan.settings.model)
    loader = Loader(plan.split, plan.vocabulary, plan.settings.data, interpolation=interpolation)
    size = min(plan.settings.train.micro_batch, 16, len(plan.split))
    # From all shards, as in training; repeated if there are few.
    items = np.random.default_rng(0).permutation(len(plan.split))
    requests = ((np.roll(items, -start)[:size], 0) for start in range(0, 10**9, size))
    try:
        batches = loader.prefetch(requests)
        next(batches)  # Opens shards, starts threads.
        began, count = time.monotonic(), 0
        while (passed := time.monotonic() - began) < _LOAD_S:
            count += len(next(batches).images)
        return count / passed
    finally:
        loader.close()


@cache
def _learned(plan: Plan) -> tuple[float, str]:
    """Return the pictures that one process learns from in a second, read from memory, and how that was found.

    0: that could not be found here.

    Raises:
        UserError: The GPU's memory is too small.
    """
    gpu = torch.cuda.is_available() and not plan.cpu
    if not gpu and not plan.cpu and plan.profile:
        return 0.0, "the job has GPUs and this machine has none"
    loader = Loader(plan.split, plan.vocabulary, plan.settings.data, plan.settings.seed)
    cached = plan.settings.train.cache_features
    size = min(plan.settings.train.micro_batch, len(plan.split))
    # Encoders are slow on CPUs, and images take much the same time.
    size = size if gpu or cached else min(size, _PICTURES_ON_CPU)
    (batch,) = loader.prefetch([(np.arange(size), 0)])
    loader.close()
    with Ranks(plan.settings.train.precision, alone=True, cpu=not gpu) as ranks:
        times = _step_times(plan, batch, ranks)
    what = "pictures' features" if cached else "pictures"
    return size / median(times), f"{len(times)} steps of {size} {what} on {ranks.device.type}"


def _step_times(plan: Plan, batch: Batch, ranks: Ranks) -> list[float]:
    """Train on one batch again and again; return the seconds of each step after the first."""
    config = plan.settings
    captioner = Captioner(config.model, len(plan.vocabulary)).to(ranks.device).train()
    if config.train.cache_features:
        with torch.no_grad():
            batch = replace(batch, images=captioner.encode(batch.images.to(ranks.device)).half())
    optimizer = make_optimizer(captioner, config.train)
    engine = create_engine(ranks, captioner, optimizer, config.train.clip_norm)
    objective = CrossEntropyObjective(config, captioner, plan.split, plan.vocabulary)

    def step_s() -> float:
        start = time.monotonic()
        training_step(engine, objective, [(0, batch)], config, 0, plan.steps)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - start

    try:
        step_s()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"train.micro_batch = {len(batch.images)}: a step does not fit into the GPU's memory"
            f" ({str(error).splitlines()[0][:200]}); lower it, or see by nvidia-smi who else uses this GPU"
        ) from None
    times: list[float] = []
    while len(times) < _STEPS and sum(times) < _STEPS_S:
        times.append(step_s())
    return times


def _logged(plan: Plan) -> float:
    """Return the images per second of all processes in the run's log; 0: no log."""
    rates = list(read_metric(plan.run, "images_per_s").values()) if plan.run else []
    return median(rates[-_RECENT:]) if rates else 0.0


def loading(plan: Plan) -> Iterator[CheckResult]:
    """Compare the throughput of loading with that of training steps."""
    if plan.settings.train.cache_features:
        yield skipped("train.cache_features: no image is decoded")
        return
    data = plan.settings.data
    loads = _loaded(plan)
    summary = f"a process loads {loads:,.0f} images/s with data.workers = {data.workers} on this machine"
    needs, how = _learned(plan)
    if not needs:
        yield skipped(f"{summary}; the throughput of a step is unknown: {how}")
        return
    summary += f", a step takes {needs:,.3g} images/s ({how})"
    if loads < needs:
        more = max(data.workers + 1, round(data.workers * needs * _ENOUGH / max(loads, 1e-9)))
        yield warning(
            f"{summary}: it would wait for images {1 - loads / needs:.0%} of the time",
            f"set data.workers to {more} if there are as many cores, or pack with --resize"
            f" {round(data.image_size * 1.2)}",
        )
    elif loads < _ENOUGH * needs:
        yield warning(f"{summary}: barely enough", "raise data.workers if there are more cores")
    else:
        yield ok(summary)


def finish(plan: Plan) -> Iterator[CheckResult]:
    """Estimate the time of an epoch and of the run, and compare it with the job's time limit."""
    rate, source = _logged(plan), f"by {plan.run}/{LOG_FILE}"
    if not rate:
        if plan.quick:
            yield from _check_job_time(plan, 0.0)
            yield skipped("the run has no log yet to estimate its time from")
            return
        learns, how = _learned(plan)
        loads = learns if plan.settings.train.cache_features else _loaded(plan)
        rate, source = min(learns, loads) * plan.world_size, f"at best, by {how}"
        if not rate:
            yield from _check_job_time(plan, 0.0)
            yield skipped(f"the throughput is unknown: {how}, and the run has no log yet")
            return
    epoch_s = len(plan.split) / rate
    step_s = epoch_s / plan.sampler.steps_per_epoch
    saved = checkpoint_steps(plan.run) if plan.run else []
    left = max(0, plan.steps - (saved[-1] if saved else 0)) * step_s
    if not left:
        yield ok(f"all {plan.steps:,} steps are done")
        return
    summary = (
        f"{rate:,.0f} images/s ({source}): {format_duration(epoch_s)} an epoch, {format_duration(left)} to"
        " the end, without validations"
    )
    if (too_short := list(_check_job_time(plan, step_s))) or plan.time_limit_s is None:
        yield from too_short
        yield ok(summary)
        return
    usable = plan.time_limit_s - plan.settings.train.grace_s
    if left > usable:
        jobs = -int(-left // usable)
        yield warning(
            f"{summary}; the job ends after {format_duration(plan.time_limit_s)}: it takes about {jobs}"
            " such jobs in sequence",
            "let it requeue itself, or ask for more --time, nodes or GPUs",
        )
    else:
        yield ok(f"{summary}; the job has {format_duration(plan.time_limit_s)}")


def _check_job_time(plan: Plan, step_s: float) -> Iterator[CheckResult]:
    """Refuse a job too short for a single step."""
    grace = plan.settings.train.grace_s
    if plan.time_limit_s is not None and plan.time_limit_s <= grace + step_s:
        step = f" and a step takes {format_duration(step_s)}" if step_s else ""
        yield failure(
            f"the job has {format_duration(plan.time_limit_s)}, of which train.grace_s = {grace:g} are"
            f" reserved for saving{step}: it would do nothing",
            "ask for more --time, or lower train.grace_s",
        )
