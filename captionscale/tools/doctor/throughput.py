"""Checks of throughput: loading against the training step, and the run against the job's time limit."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
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
from captionscale.train.objective import CrossEntropyObjective
from captionscale.train.optimizer import make_optimizer
from captionscale.train.run_folder import LOG_FILE
from captionscale.train.step import training_step

_LOAD_S = 4.0
_STEPS, _STEPS_S = 4, 12.0
_IMAGES_ON_CPU = 4
_MARGIN = 1.1
"""Factor above the throughput of a step, as loading is uneven."""
_RECENT = 20


@cache
def _loading_rate(plan: Plan) -> float:
    """Return the images per second that one process loads."""
    size = min(plan.settings.train.micro_batch, 16, len(plan.split))
    # From all shards, as in training; repeated if there are few.
    items = np.random.default_rng(0).permutation(len(plan.split))
    requests = ((np.roll(items, -start)[:size], 0) for start in range(0, 10**9, size))
    with closing(_loader(plan)) as loader:
        batches = loader.prefetch(requests)
        next(batches)  # Opens shards, starts threads.
        began, count = time.monotonic(), 0
        while (passed := time.monotonic() - began) < _LOAD_S:
            count += len(next(batches).images)
        return count / passed


@cache
def _training_rate(plan: Plan) -> tuple[float, str]:
    """Return the images per second of one process's training steps on a batch in memory, and the measurement.

    0: it cannot be measured here.

    Raises:
        UserError: The GPU's memory is too small.
    """
    gpu = torch.cuda.is_available() and not plan.cpu
    if not gpu and not plan.cpu and plan.profile:
        return 0.0, "the job has GPUs and this machine has none"
    cached = plan.settings.train.cache_features
    size = min(plan.settings.train.micro_batch, len(plan.split))
    # Encoders are slow on CPUs, and images take much the same time.
    size = size if gpu or cached else min(size, _IMAGES_ON_CPU)
    with closing(_loader(plan)) as loader:
        (batch,) = loader.prefetch([(np.arange(size), 0)])
    with Ranks(plan.settings.train.precision, alone=True, cpu=not gpu) as ranks:
        times = _step_times(plan, batch, ranks)
    what = "images' features" if cached else "images"
    return size / median(times), f"{len(times)} steps of {size} {what} on {ranks.device.type}"


def _loader(plan: Plan) -> Loader:
    config = plan.settings
    interpolation = interpolation_of(config.model)
    return Loader(plan.split, plan.vocabulary, config.data, config.seed, interpolation=interpolation)


def _step_times(plan: Plan, batch: Batch, ranks: Ranks) -> list[float]:
    """Return the seconds of repeated training steps on one batch, without the first."""
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


def loading(plan: Plan) -> Iterator[CheckResult]:
    """Compare the throughput of loading with that of training steps."""
    if plan.settings.train.cache_features:
        yield skipped("train.cache_features: no image is decoded")
        return
    data = plan.settings.data
    rate = _loading_rate(plan)
    summary = f"a process loads {rate:,.0f} images/s with data.workers = {data.workers} on this machine"
    needed, how = _training_rate(plan)
    if not needed:
        yield skipped(f"{summary}; the throughput of a step is unknown: {how}")
        return
    summary += f", a step takes {needed:,.3g} images/s ({how})"
    if rate < needed:
        workers = max(data.workers + 1, round(data.workers * needed * _MARGIN / max(rate, 1e-9)))
        yield warning(
            f"{summary}: it would wait for images {1 - rate / needed:.0%} of the time",
            f"set data.workers to {workers} if there are as many cores, or pack with --resize"
            f" {round(data.image_size * 1.2)}",
        )
    elif rate < _MARGIN * needed:
        yield warning(f"{summary}: barely enough", "raise data.workers if there are more cores")
    else:
        yield ok(summary)


def finish(plan: Plan) -> Iterator[CheckResult]:
    """Estimate the time of an epoch and of the run, and compare it with the job's time limit."""
    rates, limit_s = plan.metric("images_per_s")[-_RECENT:], plan.time_limit_s
    rate, source = median(rates or [0.0]), f"by {plan.run}/{LOG_FILE}"
    unknown = "the run has no log yet"
    if not rate and not plan.quick:
        trained, how = _training_rate(plan)
        loaded = trained if plan.settings.train.cache_features else _loading_rate(plan)
        rate, source = min(trained, loaded) * plan.world_size, f"at best, by {how}"
        unknown = f"{how}, and {unknown}"
    if not rate:
        yield from _check_job_time(plan, 0.0)
        yield skipped(f"the throughput is unknown: {unknown}")
        return
    epoch_s = len(plan.split) / rate
    step_s = epoch_s / plan.sampler.steps_per_epoch
    left_s = max(0, plan.steps - plan.saved_step) * step_s
    too_short = list(_check_job_time(plan, step_s))
    summary = (
        f"{rate:,.0f} images/s ({source}): {format_duration(epoch_s)} an epoch, {format_duration(left_s)} to"
        " the end, without validations"
    )
    if not left_s:
        yield ok(f"all {plan.steps:,} steps are done")
    elif too_short or math.isinf(limit_s):
        yield from too_short
        yield ok(summary)
    elif left_s > (usable_s := limit_s - plan.settings.train.grace_s):
        yield warning(
            f"{summary}; the job ends after {format_duration(limit_s)}: it takes about"
            f" {math.ceil(left_s / usable_s)} such jobs in sequence",
            "let it requeue itself, or ask for more --time, nodes or GPUs",
        )
    else:
        yield ok(f"{summary}; the job has {format_duration(limit_s)}")


def _check_job_time(plan: Plan, step_s: float) -> Iterator[CheckResult]:
    """Refuse a job too short for a single step."""
    grace = plan.settings.train.grace_s
    if plan.time_limit_s <= grace + step_s:
        step = f" and a step takes {format_duration(step_s)}" if step_s else ""
        yield failure(
            f"the job has {format_duration(plan.time_limit_s)}, of which train.grace_s = {grace:g} are"
            f" reserved for saving{step}: it would do nothing",
            "ask for more --time, or lower train.grace_s",
        )
