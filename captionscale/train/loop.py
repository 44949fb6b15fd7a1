"""The training loop."""

import copy
import math
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.files import lock
from captionscale.progress import Bar, progress
from captionscale.train import preemption
from captionscale.train.log_writer import Log, Rate
from captionscale.train.losses import cross_entropy, say_what_may_be_said, uneven_attention
from captionscale.train.nan_guard import Divergence
from captionscale.train.preemption_flag import Vote
from captionscale.train.profiling import profiling
from captionscale.train.sample_log import Ledger
from captionscale.train.schedule import lr_factor
from captionscale.train.scst import SelfCritical
from captionscale.train.scst_checks import refuse_collapse
from captionscale.train.setup import Job, prepare
from captionscale.train.state import Standing
from captionscale.train.tracking import Trackers
from captionscale.train.validation import Validation
from captionscale.train.watchdog import Watchdog


def train(config: Config, run: Path, profiled: int = 0) -> Standing:
    """Train a captioner, or go on with one.

    Args:
        config: The experiment.
        run: Folder of its checkpoints and logs. If it holds a checkpoint, training goes on from there.
        profiled: Steps of which a profile is written.

    Returns:
        How far the run is now: at its last step, or where early stopping or preemption ended it.

    Raises:
        UserError: Shards, weights or an earlier run that do not fit, a run that another process writes, a
            full disk, or a loss that is no number.
    """
    with Ranks(config.train.precision) as ranks, ExitStack() as stack:
        ranks.on_first(stack.enter_context, lock(run, "captionscale train"))
        return learn(prepare(config, run, ranks, stack), profiled)


def learn(job: Job, profiled: int = 0) -> Standing:
    """Take the steps that a run has yet to take; log, score and save as it asks for.

    Args:
        job: Ready for its next step.
        profiled: As of `train`.

    Returns:
        As `train`.

    Raises:
        UserError: A full disk, or a loss that is no number.
    """
    settings, run, ranks = job.config.train, job.run, job.ranks
    standing, before = job.standing, copy.copy(job.standing)
    start = standing.step
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(run, start, standing.judged))) if ranks.first else None
        if ranks.first and settings.trackers:
            stack.enter_context(closing(Trackers(run, job.config)))
        bar = stack.enter_context(progress("training", job.steps, start, quiet=not ranks.first))
        ledger = stack.enter_context(closing(Ledger(run, ranks))) if settings.ledger else None
        score_every = settings.score_every or job.order.steps_per_epoch
        save_every = settings.save_every or job.order.steps_per_epoch
        dog = stack.enter_context(Watchdog(run, ranks, settings.stall_s, job.shards))
        validation = stack.enter_context(closing(Validation(job, log, bar, dog)))
        rate, divergence, vote = Rate(), Divergence(ranks, settings.precision), Vote()
        saved, leaving = start, False
        dog.beat(start)
        watched = stack.enter_context(profiling(run, profiled * ranks.first, start, bar.say))

        def scores(done: int) -> bool:
            return done == job.steps or done % score_every == 0

        if start and scores(start) and (standing.captioned < start or start == job.steps):
            # Of what came before the last checkpoint this is still owed.
            leaving = not validation.take()
            if standing != before:
                job.save()
        for step, share in () if leaving else job.shares():
            dog.beat(step)
            if validation.hopeless:
                bar.say(f"stopping: no better {settings.score_metric} since step {standing.best_step:,}")
                break
            if leaving := vote.carried():
                break
            job.unfreeze(step)
            loss, norm, losses = _learn(job, step, share, ledger, dog, vote)

            done = standing.step = step + 1
            rate.count([batch for _, batch in share])
            divergence.keep(done, loss, norm, share, losses)
            logs = done == job.steps or done % settings.log_every == 0
            saves = scores(done) or done % save_every == 0
            if logs or saves:
                divergence.refuse()
            if logs:
                _log(job, log, bar, loss, norm, rate)
                _log_saves(job, log)
                validation.tell()
            if scores(done):
                if leaving := vote.carried() or not validation.take():
                    break
                rate.restart()
            if saves:
                with dog.busy("saving"):
                    job.save()
                saved = done
            watched()
            bar.advance()
            dog.beat(done)
        with dog.busy("saving"):
            if leaving and standing.step > saved:
                divergence.refuse()
                job.save()
            job.wait_for_save()
        _log_saves(job, log)
        if leaving:
            _leave(job, log, before)
        else:
            best = (
                f", the best {settings.score_metric} {standing.best_score:.4f} at step {standing.best_step:,}"
            )
            told = f"{run}: {standing.step:,} steps done, of {job.steps:,}"
            bar.say(told + best * bool(standing.best_step))
    return standing


def _learn(
    job: Job,
    step: int,
    share: list[tuple[int, Batch]],
    ledger: Ledger | None,
    dog: Watchdog,
    vote: Vote,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Take one optimiser step.

    Returns:
        The loss of each word, over all ranks, the gradient's norm, and the loss of each micro-batch.
    """
    config, ranks, engine = job.config, job.ranks, job.engine
    settings, done = config.train, step / job.steps
    work = job.objective.targets([(number, batch.to(ranks.device)) for number, batch in share], step, ranks)
    counts = torch.stack([target.words for target in work]).sum(0)
    *words, leaving = ranks.sum(*counts, preemption.asked())
    vote.count(leaving)
    for group in engine.param_groups:
        group["lr"] = group["peak_lr"] * lr_factor(step, job.steps, settings.warmup)
    losses = []
    for (number, batch), target in engine.last_one_syncs(zip(share, work, strict=True)):
        ranks.seed(config.seed, step, number)
        sampling_prob = settings.scheduled_sampling * done
        following, rows = target.tokens[:, 1:], target.rows
        logits, attention = engine(target.pictures, target.read, target.image_index, sampling_prob, rows)
        logits = say_what_may_be_said(logits, target, rows)
        surprise = cross_entropy(logits, following, job.objective.label_smoothing, rows)
        if settings.doubly_stochastic and attention is not None:
            surprise = surprise + settings.doubly_stochastic * uneven_attention(attention, following)
        loss = surprise @ target.weights(torch.stack(words), job.objective.of_people)
        # DDP takes the mean over ranks, and a word weighs the same on each of them.
        engine.backward(loss * ranks.size)
        losses.append(loss.detach())
        if ledger:
            ledger.write(step, number, batch.image_ids)
        dog.beat(step)
    norm = engine.update()
    if job.average:
        job.average.update(step)
    return ranks.sum(sum(losses))[0], norm, losses


def _log(job: Job, log: Log | None, bar: Bar, loss: Tensor, norm: Tensor, rate: Rate) -> None:
    step, settings = job.standing.step, job.config.train
    values = {
        "loss": loss.item(),
        "lr": settings.lr * lr_factor(step - 1, job.steps, settings.warmup),
        "gradient_norm": norm.item() if math.isfinite(norm.item()) else None,
        **rate.read(job.ranks),
    }
    told = "loss {loss:.3f}  {images_per_s:,.0f} images/s  {captions_per_s:,.0f} captions/s"
    if isinstance(job.objective, SelfCritical):
        sampled = job.objective.figures.read(job.ranks)
        job.standing.began = job.standing.began or sampled
        values |= sampled
        told += "  reward {reward:.3f}"
    bar.note(told.format_map(values))
    if log:
        log.write(step, epoch=step / job.order.steps_per_epoch, **values)
    if isinstance(job.objective, SelfCritical):
        job.ranks.on_first(refuse_collapse, job.standing, sampled, job.config.scst)


def _log_saves(job: Job, log: Log | None) -> None:
    """Tell of the checkpoints that came to the disk, or that one did not."""
    for step, seconds in job.ranks.on_first(job.saver.written).items():
        if log:
            log.write(step, **seconds)


def _leave(job: Job, log: Log | None, before: Standing) -> None:
    """Tell what a run that leaves before its end has saved, and how fast."""
    seconds, reason = max(job.ranks.gather([preemption.notice()]))
    step, run = job.standing.step, job.run
    if reason == preemption.END_OF_TIME and job.standing == before:
        job.ranks.on_first(_refuse_haste, run, step)
    if log:
        log.write(step, left_for=reason, left_after_s=seconds)
    # All of them: a launcher on another machine would take an end without a code for the end of the work.
    preemption.leave(f"{run}: {reason}: step {step:,} was saved within {seconds:.1f} s" if log else "")


def _refuse_haste(run: Path, step: int) -> None:
    raise UserError(
        f"{run}: the job's time ended before step {step + 1:,}, wanted at least one step in each job, or"
        " it would be requeued for ever; ask for more --time, or lower train.grace_s"
    )
