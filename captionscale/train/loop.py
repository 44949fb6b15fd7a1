"""The training loop."""

import copy
import math
from contextlib import ExitStack, closing
from pathlib import Path

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
from captionscale.train.step import StepResult, training_step
from captionscale.train.tracking import Trackers
from captionscale.train.validation import Validation
from captionscale.train.watchdog import Watchdog


def train(config: Config, run: Path, profile_steps: int = 0, *, sample_log: bool = False) -> TrainState:
    """Train a captioner; a run with a checkpoint resumes from it.

    `sample_log` records the images of every micro-batch, as `captionscale drill` needs.

    Returns:
        State at the last step, or at the step of early stopping or preemption.

    Raises:
        UserError: Shards, weights or an earlier run that do not fit, a run that another process writes, a
            full disk, or a loss that is not finite.
    """
    with Ranks(config.train.precision) as ranks, ExitStack() as stack:
        ranks.run_on_main(stack.enter_context, lock(run, "captionscale train"))
        return train_loop(build_run(config, run, ranks, stack), profile_steps, sample_log=sample_log)


def train_loop(run: Run, profile_steps: int = 0, *, sample_log: bool = False) -> TrainState:
    """Take the remaining steps of a run; arguments, result and errors as those of `train`."""
    config, ranks, state = run.config, run.ranks, run.train_state
    settings, start, initial_state = config.train, state.step, copy.copy(state)
    score_every = settings.score_every or run.sampler.steps_per_epoch
    save_every = settings.save_every or run.sampler.steps_per_epoch
    with ExitStack() as stack:
        log = None
        if ranks.is_main:
            log = stack.enter_context(closing(LogWriter(run.folder, start, state.scored_step)))
            if settings.trackers:
                stack.enter_context(closing(Trackers(run.folder, config)))
        bar = stack.enter_context(progress("training", run.steps, start, quiet=not ranks.is_main))
        samples = stack.enter_context(closing(SampleLog(run.folder, ranks))) if sample_log else None
        watchdog = stack.enter_context(Watchdog(run.folder, ranks, settings.stall_s, run.shards))
        validation = stack.enter_context(closing(Validation(run, log, bar, watchdog)))
        profiled_steps = profile_steps if ranks.is_main else 0
        after_step = stack.enter_context(profiling(run.folder, profiled_steps, start, bar.say))
        throughput, nan_guard, flag = Throughput(), NanGuard(ranks, settings.precision), PreemptionFlag()
        saved_step, preempted = start, False

        def is_scored(step: int) -> bool:
            return step == run.steps or step % score_every == 0

        def beat(number: int, batch: Batch) -> None:
            if samples:
                samples.write(state.step, number, batch.image_ids)
            watchdog.beat(state.step)

        if start and is_scored(start) and (state.validated_step < start or start == run.steps):
            # The last checkpoint was saved before this validation was complete.
            preempted = not validation.run()
            if state != initial_state:
                run.save()
        for step, batches in () if preempted else run.steps_with_batches():
            watchdog.beat(step)
            if validation.out_of_patience:
                bar.say(f"stopping: no better {settings.score_metric} since step {state.best_step:,}")
                break
            if preempted := flag.is_set():
                break
            run.unfreeze(step)
            result = training_step(
                run.engine, run.objective, batches, config, step, run.steps, flag=flag, after_micro_batch=beat
            )
            if run.ema:
                run.ema.update(step)

            done = state.step = step + 1
            throughput.update([batch for _, batch in batches])
            nan_guard.record(done, result, batches)
            logs = done == run.steps or done % settings.log_every == 0
            saves = is_scored(done) or done % save_every == 0
            if logs or saves:
                nan_guard.check()
            if logs:
                _log(run, log, bar, result, throughput)
                _log_saves(run, log)
                validation.log_scores()
            if is_scored(done):
                if preempted := flag.is_set() or not validation.run():
                    break
                throughput.reset()
            if saves:
                with watchdog.busy("saving"):
                    run.save()
                saved_step = done
            after_step()
            bar.advance()
            watchdog.beat(done)
        with watchdog.busy("saving"):
            if preempted and state.step > saved_step:
                nan_guard.check()
                run.save()
            run.wait_for_save()
        _log_saves(run, log)
        if preempted:
            _report_preemption(run, log, initial_state)
        else:
            text = f"{run.folder}: {state.step:,} of {run.steps:,} steps done"
            if state.best_step:
                text += (
                    f", the best {settings.score_metric} {state.best_score:.4f} at step {state.best_step:,}"
                )
            bar.say(text)
    return state


def _log(run: Run, log: LogWriter | None, bar: Bar, result: StepResult, throughput: Throughput) -> None:
    state, settings = run.train_state, run.config.train
    figures, norm = run.objective.figures(run.ranks), result.grad_norm.item()
    state.initial_figures = state.initial_figures or figures
    values = {
        "loss": result.loss.item(),
        "lr": settings.lr * lr_factor(state.step - 1, run.steps, settings.warmup_ratio),
        "grad_norm": norm if math.isfinite(norm) else None,
        **throughput.compute(run.ranks),
        **figures,
    }
    rates = f"{values['images_per_s']:,.0f} images/s  {values['captions_per_s']:,.0f} captions/s"
    shown = [f"{name} {values[name]:.3f}" for name in run.objective.progress_figures]
    bar.note("  ".join([f"loss {values['loss']:.3f}", rates, *shown]))
    if log:
        log.write(state.step, epoch=state.step / run.sampler.steps_per_epoch, **values)
    run.ranks.run_on_main(run.objective.check_figures, state, figures)


def _log_saves(run: Run, log: LogWriter | None) -> None:
    """Log the checkpoints completed since the last call; raise if one failed."""
    for step, seconds in run.ranks.run_on_main(run.checkpoint_writer.pop_timings).items():
        if log:
            log.write(step, **seconds)


def _report_preemption(run: Run, log: LogWriter | None, initial_state: TrainState) -> None:
    """Report why the run stops early, and that it was saved."""
    seconds, reason = max(run.ranks.gather([preemption.last_request()]))
    state = run.train_state
    if reason == preemption.TIME_LIMIT and state == initial_state:
        run.ranks.run_on_main(_refuse_short_job, run.folder, state.step)
    if log:
        log.write(state.step, stop_reason=reason, stop_save_s=seconds)
    # On all ranks: a launcher on another machine would take exit code 0 for the end of the run.
    preemption.mark_preempted(
        f"{run.folder}: {reason}: step {state.step:,} was saved within {seconds:.1f} s" if log else ""
    )


def _refuse_short_job(folder: Path, step: int) -> None:
    raise UserError(
        f"{folder}: the job's time ended before step {step + 1:,}, expected at least one step in each job, or"
        " it would be requeued forever; ask for more --time, or lower train.grace_s"
    )
