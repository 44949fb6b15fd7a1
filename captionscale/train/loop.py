"""The training loop."""

import math
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.data.shards import Split
from captionscale.errors import UserError
from captionscale.files import lock
from captionscale.progress import Bar, progress
from captionscale.ranks import Ranks
from captionscale.score.evaluate import Result, caption_split, write_results
from captionscale.score.metrics import score
from captionscale.train import preempt
from captionscale.train.checkpoint import Standing
from captionscale.train.divergence import Divergence
from captionscale.train.job import Job, prepare
from captionscale.train.ledger import Ledger
from captionscale.train.logs import Log
from captionscale.train.losses import cross_entropy
from captionscale.train.schedule import lr_factor
from captionscale.train.watchdog import Watchdog


def train(config: Config, run: Path) -> Standing:
    """Train a captioner, or go on with one.

    Args:
        config: The experiment.
        run: Folder of its checkpoints and logs. If it holds a checkpoint, training goes on from there.

    Returns:
        How far the run is now: at its last step, or where early stopping or preemption ended it.

    Raises:
        UserError: Shards, weights or an earlier run that do not fit, a run that another process writes, a
            full disk, or a loss that is no number.
    """
    with Ranks(config.train.precision) as ranks, ExitStack() as stack:
        ranks.on_first(stack.enter_context, lock(run, "captionscale train"))
        return learn(prepare(config, run, ranks, stack))


def learn(job: Job) -> Standing:
    """Take the steps that a run has yet to take; log, score and save as it asks for.

    Args:
        job: Ready for its next step.

    Returns:
        As `train`.

    Raises:
        UserError: A full disk, or a loss that is no number.
    """
    settings, run, ranks = job.config.train, job.run, job.ranks
    standing, start = job.standing, job.standing.step
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(run, start))) if ranks.first else None
        bar = stack.enter_context(progress("training", job.steps, start, quiet=not ranks.first))
        ledger = stack.enter_context(closing(Ledger(run, ranks))) if settings.ledger else None
        score_every = settings.score_every or job.order.steps_per_epoch
        save_every = settings.save_every or job.order.steps_per_epoch
        dog = stack.enter_context(Watchdog(run, ranks, settings.stall_s, job.shards))
        rate, divergence, vote = _Rate(), Divergence(ranks, settings.precision), _Vote()
        saved, leaving = start, False
        if standing.unscored:
            standing.unscored = leaving = not _validate(job, log, bar, dog)
            if not leaving:
                job.save()
        for step, share in () if leaving else job.shares():
            dog.beat(step)
            if standing.scores_since_best >= settings.patience:
                bar.say(f"stopping: no better {settings.score_metric} since step {standing.best_step:,}")
                break
            if leaving := vote.carried():
                break
            loss, norm, losses = _learn(job, step, share, ledger, dog, vote)

            done = standing.step = step + 1
            last = done == job.steps
            rate.count([batch for _, batch in share])
            divergence.keep(done, loss, norm, share, losses)
            logs = last or done % settings.log_every == 0
            scores = last or done % score_every == 0
            saves = scores or done % save_every == 0
            if logs or saves:
                divergence.refuse()
            if logs:
                _log(job, log, bar, loss, norm, rate)
                _log_saves(job, log)
            if scores:
                standing.unscored = leaving = vote.carried() or not _validate(job, log, bar, dog)
                if leaving:
                    break
                rate.restart()
            if saves:
                with dog.busy("saving"):
                    job.save()
                saved = done
            bar.advance()
        with dog.busy("saving"):
            if leaving and standing.step > saved:
                divergence.refuse()
                job.save()
            job.wait_for_save()
        _log_saves(job, log)
        if leaving:
            _leave(job, log, start)
        else:
            bar.say(
                f"{run}: {standing.step:,} of {job.steps:,} steps done, the best {settings.score_metric}"
                f" {standing.best_score:.4f} at step {standing.best_step:,}"
            )
    return standing


def _learn(
    job: Job,
    step: int,
    share: list[tuple[int, Batch]],
    ledger: Ledger | None,
    dog: Watchdog,
    vote: "_Vote",
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Take one optimiser step.

    Returns:
        The loss of each word, over all ranks, the gradient's norm, and the loss of each micro-batch.
    """
    config, ranks, engine = job.config, job.ranks, job.engine
    words, leaving = ranks.sum(sum(batch.words for _, batch in share), preempt.asked())
    vote.count(leaving)
    for group in engine.param_groups:
        group["lr"] = group["peak_lr"] * lr_factor(step, job.steps, config.train.warmup)
    losses = []
    for number, batch in engine.last_one_syncs(share):
        here = batch.to(ranks.device)
        ranks.seed(config.seed, step, number)
        logits, _ = engine(here.images, here.tokens[:, :-1], here.owners)
        loss = cross_entropy(logits, here.tokens[:, 1:], config.train.label_smoothing)  # a sum
        # DDP takes the mean over ranks, and a word weighs the same on each of them.
        engine.backward(loss * ranks.size / words)
        losses.append(loss.detach())
        if ledger:
            ledger.write(step, number, batch.image_ids)
        dog.beat(step)
    norm = engine.update()
    return ranks.sum(sum(losses))[0] / words, norm, losses


def _log(job: Job, log: Log | None, bar: Bar, loss: Tensor, norm: Tensor, rate: "_Rate") -> None:
    step, settings = job.standing.step, job.config.train
    values = {
        "loss": loss.item(),
        "lr": settings.lr * lr_factor(step - 1, job.steps, settings.warmup),
        "gradient_norm": norm.item() if math.isfinite(norm.item()) else None,
        **rate.read(job.ranks),
    }
    bar.note(
        "loss {loss:.3f}  {images_per_s:,.0f} images/s  {captions_per_s:,.0f} captions/s".format_map(values)
    )
    if log:
        log.write(step, epoch=step / job.order.steps_per_epoch, **values)


def _log_saves(job: Job, log: Log | None) -> None:
    """Tell of the checkpoints that came to the disk, or that one did not."""
    for step, seconds in job.ranks.on_first(job.saver.written).items():
        if log:
            log.write(step, **seconds)


def _validate(job: Job, log: Log | None, bar: Bar, dog: Watchdog) -> bool:
    """Score the captions that the captioner now writes for the validation split.

    Returns:
        Whether that was done: who is asked to leave breaks it off, and whoever goes on does it again.
    """

    def asked_to_leave() -> bool:
        dog.beat()
        return preempt.asked()

    # Greedy: five times as fast, and the order of checkpoints is the same.
    settings = job.config.with_beam(1).search
    job.ranks.share_buffers(job.captioner)
    results = caption_split(
        job.captioner, job.val_loader, settings, job.ranks, "validation", asked_to_leave=asked_to_leave
    )
    if results is None:
        return False
    with dog.busy("scoring"):
        scores = job.ranks.on_first(_score, job.run, job.standing.step, results, job.val_loader.split)
    if scores is None:
        return False
    job.standing.judge(scores[job.config.train.score_metric])
    figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    bar.say(f"step {job.standing.step:,}  {figures}")
    if log:
        log.write(job.standing.step, scores=scores)
    return True


def _score(run: Path, step: int, results: list[Result], split: Split) -> dict[str, float] | None:
    write_results(results, run / "validation" / f"step-{step:08d}.json")
    captions = {result["image_id"]: result["caption"] for result in results}
    # Without METEOR, whose JVM takes ten seconds to start.
    try:
        return score(captions, split.references(), ("BLEU-4", "ROUGE-L", "CIDEr-D")).values
    except UserError:
        # SLURM and Ctrl-C signal all processes: Java, which knows no grace, has died of it.
        if preempt.asked():
            return None
        raise


def _leave(job: Job, log: Log | None, start: int) -> None:
    """Tell what a run that leaves before its end has saved, and how fast."""
    seconds, reason = max(job.ranks.gather([preempt.notice()]))
    step, run = job.standing.step, job.run
    if reason == preempt.END_OF_TIME and step == start:
        if log is None:
            raise SystemExit(1)
        raise UserError(
            f"{run}: the job's time ended before step {step + 1:,}, wanted at least one step in each job, or"
            " it would be requeued for ever; ask for more --time, or lower train.grace_s"
        )
    if log:
        log.write(step, left_for=reason, left_after_s=seconds)
    # All of them: a launcher on another machine would take an end without a code for the end of the work.
    preempt.leave(f"{run}: {reason}: step {step:,} was saved within {seconds:.1f} s" if log else "")


class _Vote:
    """Whether a rank was asked to leave when the last step began: all ranks read the same.

    It came with the number of words, and is read a step later, so that no rank waits for its device.
    """

    def __init__(self) -> None:
        self._asked: Tensor | None = None
        self._here: torch.cuda.Event | None = None

    def count(self, asked: Tensor) -> None:
        """Take how many were asked, summed over all ranks."""
        self._asked = asked.to("cpu", non_blocking=True)
        if asked.is_cuda:
            self._here = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._here.record()

    def carried(self) -> bool:
        """Return whether any was."""
        if self._here is not None:
            self._here.synchronize()
        return self._asked is not None and bool(self._asked)


class _Rate:
    """Counts images and captions between two readings."""

    def __init__(self) -> None:
        self.restart()

    def count(self, batches: list[Batch]) -> None:
        self._images += sum(len(batch.images) for batch in batches)
        self._captions += sum(len(batch.tokens) for batch in batches)

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Return the pace of all ranks together since the last reading."""
        seconds = time.monotonic() - self._began
        images, captions = (ranks.sum(self._images, self._captions) / seconds).tolist()
        self.restart()
        return {"images_per_s": images, "captions_per_s": captions}

    def restart(self) -> None:
        """Count from now on, leaving out what was done since the last reading."""
        self._began, self._images, self._captions = time.monotonic(), 0, 0
