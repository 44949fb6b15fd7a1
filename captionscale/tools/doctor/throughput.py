"""Checks of time: loading against the step, an epoch, and the end of the run against that of the job."""

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
from captionscale.progress import format_duration
from captionscale.tools.doctor.plan import Plan
from captionscale.tools.doctor.report import CheckResult, failure, ok, skipped, warning
from captionscale.train.log_reader import read_metric
from captionscale.train.objective import CrossEntropyObjective
from captionscale.train.optimizer import make_optimizer
from captionscale.train.run_folder import checkpoint_steps
from captionscale.train.step import training_step

_LOAD_S = 4.0
_STEPS, _STEPS_S = 4, 12.0
_PICTURES_ON_CPU = 4
_ENOUGH = 1.1
"""Times what a step reads: loading is never quite even."""
_RECENT = 20


@cache
def _loaded(plan: Plan) -> float:
    """Return the pictures that one process loads in a second, with the config's own settings."""
    loader = Loader(plan.split, plan.vocabulary, plan.settings.data, plan.settings.seed)
    size = min(plan.settings.train.micro_batch, 16, len(plan.split))
    # Over all shards, as training reads; again from the start where there are few.
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
    """Return the pictures in a second that the run's own log tells, of all its processes; 0: none."""
    rates = list(read_metric(plan.run, "images_per_s").values()) if plan.run else []
    return median(rates[-_RECENT:]) if rates else 0.0


def loading(plan: Plan) -> Iterator[CheckResult]:
    """Compare what a process loads with what it learns from."""
    if plan.settings.train.cache_features:
        yield skipped("train.cache_features: features are read, and no picture is decoded")
        return
    data = plan.settings.data
    loads = _loaded(plan)
    told = f"a process loads {loads:,.0f} images/s with data.workers = {data.workers} on this machine"
    needs, how = _learned(plan)
    if not needs:
        yield skipped(f"{told}; what a step needs is unknown: {how}")
        return
    told += f", a step takes {needs:,.3g} images/s ({how})"
    if loads < needs:
        more = max(data.workers + 1, round(data.workers * needs * _ENOUGH / max(loads, 1e-9)))
        yield warning(
            f"{told}: {1 - loads / needs:.0%} of the time it would wait for pictures",
            f"set data.workers to {more} if there are so many cores, or pack with --resize"
            f" {round(data.image_size * 1.2)}",
        )
    elif loads < _ENOUGH * needs:
        yield warning(f"{told}: that is just enough", "set data.workers higher if there are cores")
    else:
        yield ok(told)


def finish(plan: Plan) -> Iterator[CheckResult]:
    """Foretell how long an epoch and the whole run take, and compare that with the job's time."""
    rate, source = _logged(plan), f"by {plan.run}/log.jsonl"
    if not rate:
        if plan.quick:
            yield from _haste(plan, 0.0)
            yield skipped("the run has no log yet that would tell its pace")
            return
        learns, how = _learned(plan)
        loads = learns if plan.settings.train.cache_features else _loaded(plan)
        rate, source = min(learns, loads) * plan.world_size, f"at best, by {how}"
        if not rate:
            yield from _haste(plan, 0.0)
            yield skipped(f"the pace is unknown: {how}, and the run has no log yet")
            return
    epoch_s = len(plan.split) / rate
    step_s = epoch_s / plan.sampler.steps_per_epoch
    saved = checkpoint_steps(plan.run) if plan.run else []
    left = max(0, plan.steps - (saved[-1] if saved else 0)) * step_s
    if not left:
        yield ok(f"all {plan.steps:,} steps are done")
        return
    told = (
        f"{rate:,.0f} images/s ({source}): {format_duration(epoch_s)} an epoch, {format_duration(left)} to the end, and the"
        " time of validations"
    )
    if (hasty := list(_haste(plan, step_s))) or plan.time_limit_s is None:
        yield from hasty
        yield ok(told)
        return
    usable = plan.time_limit_s - plan.settings.train.grace_s
    if left > usable:
        yield warning(
            f"{told}; the job ends after {format_duration(plan.time_limit_s)}: it takes about {-int(-left // usable)}"
            " such jobs, one after the other",
            "let it requeue itself, or ask for more --time, nodes or GPUs",
        )
    else:
        yield ok(f"{told}; the job has {format_duration(plan.time_limit_s)}")


def _haste(plan: Plan, step_s: float) -> Iterator[CheckResult]:
    """Refuse a job that would end before it has done anything."""
    grace = plan.settings.train.grace_s
    if plan.time_limit_s is not None and plan.time_limit_s <= grace + step_s:
        step = f" and a step takes {format_duration(step_s)}" if step_s else ""
        yield failure(
            f"the job has {format_duration(plan.time_limit_s)}, of which train.grace_s = {grace:g} are kept to save"
            f" in{step}: it would do nothing",
            "ask for more --time, or lower train.grace_s",
        )
