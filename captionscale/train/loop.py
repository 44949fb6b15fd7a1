"""The training loop."""

import copy
import math
from contextlib import ExitStack, closing
from pathlib import Path

from torch import Tensor

from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.files import lock
from captionscale.progress import Bar, progress
from captionscale.train import preemption
from captionscale.train.log_writer import LogWriter, Throughput
from captionscale.train.nan_guard import NanGuard
from captionscale.train.preemption import PreemptionFlag
from captionscale.train.profiling import profiling
from captionscale.train.sample_log import SampleLog
from captionscale.train.schedule import lr_factor
from captionscale.train.setup import Run, build_run
from captionscale.train.state import TrainState
from captionscale.train.step import training_step
from captionscale.train.tracking import Trackers
from captionscale.train.validation import Validation
from captionscale.train.watchdog import Watchdog


def train(config: Config, run: Path, profile_steps: int = 0) -> TrainState:
    """Train a captioner, or go on with one.

    Args:
        config: The experiment.
        run: Folder of its checkpoints and logs. If it holds a checkpoint, training goes on from there.
        profile_steps: Steps of which a profile is written.

    Returns:
        How far the run is now: at its last step, or where early stopping or preemption ended it.

    Raises:
        UserError: Shards, weights or an earlier run that do not fit, a run that another process writes, a
            full disk, or a loss that is no number.
    """
    with Ranks(config.train.precision) as ranks, ExitStack() as stack:
        ranks.run_on_main(stack.enter_context, lock(run, "captionscale train"))
        return train_loop(build_run(config, run, ranks, stack), profile_steps)


def train_loop(job: Run, profile_steps: int = 0) -> TrainState:
    """Take the steps that a run has yet to take; log, score and save as it asks for.

    Args:
        job: Ready for its next step.
        profile_steps: As of `train`.

    Returns:
        As `train`.

    Raises:
        UserError: A full disk, or a loss that is no number.
    """
    settings, run, ranks = job.config.train, job.folder, job.ranks
    train_state, before = job.train_state, copy.copy(job.train_state)
    start = train_state.step
    with ExitStack() as stack:
        log = (
            stack.enter_context(closing(LogWriter(run, start, train_state.scored_step)))
            if ranks.is_main
            else None
        )
        if ranks.is_main and settings.trackers:
            stack.enter_context(closing(Trackers(run, job.config)))
        bar = stack.enter_context(progress("training", job.steps, start, quiet=not ranks.is_main))
        sample_log = stack.enter_context(closing(SampleLog(run, ranks))) if settings.sample_log else None
        score_every = settings.score_every or job.sampler.steps_per_epoch
        save_every = settings.save_every or job.sampler.steps_per_epoch
        watchdog = stack.enter_context(Watchdog(run, ranks, settings.stall_s, job.shards))
        validation = stack.enter_context(closing(Validation(job, log, bar, watchdog)))
        rate, divergence, vote = Throughput(), NanGuard(ranks, settings.precision), PreemptionFlag()
        saved, leaving = start, False
        watchdog.beat(start)
        watched = stack.enter_context(profiling(run, profile_steps * ranks.is_main, start, bar.say))

        def scores(done: int) -> bool:
            return done == job.steps or done % score_every == 0

        if start and scores(start) and (train_state.validated_step < start or start == job.steps):
            # Of what came before the last checkpoint this is still owed.
            leaving = not validation.run()
            if train_state != before:
                job.save()
        for step, share in () if leaving else job.steps_with_batches():
            watchdog.beat(step)
            if validation.out_of_patience:
                bar.say(f"stopping: no better {settings.score_metric} since step {train_state.best_step:,}")
                break
            if leaving := vote.is_set():
                break
            job.unfreeze(step)

            def after_micro_batch(number: int, batch: Batch, step: int = step) -> None:
                if sample_log:
                    sample_log.write(step, number, batch.image_ids)
                watchdog.beat(step)

            loss, norm, losses = training_step(
                job.engine,
                job.objective,
                share,
                job.config,
                step,
                job.steps,
                flag=vote,
                after_micro_batch=after_micro_batch,
            )
            if job.ema:
                job.ema.update(step)

            done = train_state.step = step + 1
            rate.update([batch for _, batch in share])
            divergence.record(done, loss, norm, share, losses)
            logs = done == job.steps or done % settings.log_every == 0
            saves = scores(done) or done % save_every == 0
            if logs or saves:
                divergence.check()
            if logs:
                _log(job, log, bar, loss, norm, rate)
                _log_saves(job, log)
                validation.log_scores()
            if scores(done):
                if leaving := vote.is_set() or not validation.run():
                    break
                rate.reset()
            if saves:
                with watchdog.busy("saving"):
                    job.save()
                saved = done
            watched()
            bar.advance()
            watchdog.beat(done)
        with watchdog.busy("saving"):
            if leaving and train_state.step > saved:
                divergence.check()
                job.save()
            job.wait_for_save()
        _log_saves(job, log)
        if leaving:
            _leave(job, log, before)
        else:
            best = f", the best {settings.score_metric} {train_state.best_score:.4f} at step {train_state.best_step:,}"
            told = f"{run}: {train_state.step:,} steps done, of {job.steps:,}"
            bar.say(told + best * bool(train_state.best_step))
    return train_state


def _log(job: Run, log: LogWriter | None, bar: Bar, loss: Tensor, norm: Tensor, rate: Throughput) -> None:
    step, settings = job.train_state.step, job.config.train
    values = {
        "loss": loss.item(),
        "lr": settings.lr * lr_factor(step - 1, job.steps, settings.warmup_ratio),
        "grad_norm": norm.item() if math.isfinite(norm.item()) else None,
        **rate.compute(job.ranks),
    }
    figures = job.objective.figures(job.ranks)
    job.train_state.initial_figures = job.train_state.initial_figures or figures
    values |= figures
    told = "loss {loss:.3f}  {images_per_s:,.0f} images/s  {captions_per_s:,.0f} captions/s".format_map(
        values
    )
    bar.note("  ".join([told, *(f"{name} {values[name]:.3f}" for name in job.objective.progress_figures)]))
    if log:
        log.write(step, epoch=step / job.sampler.steps_per_epoch, **values)
    job.ranks.run_on_main(job.objective.check_figures, job.train_state, figures)


def _log_saves(job: Run, log: LogWriter | None) -> None:
    """Tell of the checkpoints that came to the disk, or that one did not."""
    for step, seconds in job.ranks.run_on_main(job.checkpoint_writer.pop_timings).items():
        if log:
            log.write(step, **seconds)


def _leave(job: Run, log: LogWriter | None, before: TrainState) -> None:
    """Tell what a run that leaves before its end has saved, and how fast."""
    seconds, reason = max(job.ranks.gather([preemption.last_request()]))
    step, run = job.train_state.step, job.folder
    if reason == preemption.TIME_LIMIT and job.train_state == before:
        job.ranks.run_on_main(_refuse_haste, run, step)
    if log:
        log.write(step, stop_reason=reason, stop_save_s=seconds)
    # All of them: a launcher on another machine would take an end without a code for the end of the work.
    preemption.mark_preempted(
        f"{run}: {reason}: step {step:,} was saved within {seconds:.1f} s" if log else ""
    )


def _refuse_haste(run: Path, step: int) -> None:
    raise UserError(
        f"{run}: the job's time ended before step {step + 1:,}, wanted at least one step in each job, or"
        " it would be requeued for ever; ask for more --time, or lower train.grace_s"
    )
