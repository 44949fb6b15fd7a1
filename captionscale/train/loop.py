"""The training loop."""

import math
import time
from contextlib import ExitStack, closing
from pathlib import Path

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
from captionscale.train.checkpoint import Standing
from captionscale.train.job import Job, prepare
from captionscale.train.logs import Log
from captionscale.train.losses import cross_entropy
from captionscale.train.schedule import lr_factor


def train(config: Config, run: Path) -> Standing:
    """Train a captioner, or go on with one.

    Args:
        config: The experiment.
        run: Folder of its checkpoints and logs. If it holds a checkpoint, training goes on from there.

    Returns:
        How far the run is now: at its last step, or where early stopping ended it.

    Raises:
        UserError: Shards, weights or an earlier run that do not fit, a run that another process writes, a
            full disk, or a loss that is no number.
    """
    settings = config.train
    with Ranks(settings.precision) as ranks, ExitStack() as stack:
        ranks.on_first(stack.enter_context, lock(run, "captionscale train"))
        job = prepare(config, run, ranks, stack)
        standing, start = job.standing, job.standing.step
        log = stack.enter_context(closing(Log(run, start))) if ranks.first else None
        bar = stack.enter_context(progress("training", job.steps, start, quiet=not ranks.first))
        score_every = settings.score_every or job.order.steps_per_epoch
        save_every = settings.save_every or job.order.steps_per_epoch
        rate = _Rate()
        for step, share in job.shares():
            if standing.scores_since_best >= settings.patience:
                bar.say(f"stopping: no better {settings.score_metric} since step {standing.best_step:,}")
                break
            loss, norm = _learn(job, step, share)

            done = standing.step = step + 1
            last = done == job.steps
            rate.count([batch for _, batch in share])
            logs = last or done % settings.log_every == 0
            scores = last or done % score_every == 0
            saves = scores or done % save_every == 0
            if logs or saves:
                _refuse_nonsense(done, loss, norm, settings.precision)
            if logs:
                _log(job, log, bar, loss, norm, rate)
            if scores:
                _validate(job, log, bar)
                rate.restart()
            if saves:
                job.save()
            bar.advance()
        bar.say(
            f"{run}: {standing.step:,} of {job.steps:,} steps done, the best {settings.score_metric}"
            f" {standing.best_score:.4f} at step {standing.best_step:,}"
        )
    return standing


def _learn(job: Job, step: int, share: list[tuple[int, Batch]]) -> tuple[Tensor, Tensor]:
    """Take one optimiser step; return the loss of each word, over all ranks, and the gradient's norm."""
    config, ranks, engine = job.config, job.ranks, job.engine
    words = ranks.sum(sum(batch.words for _, batch in share))
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
    norm = engine.update()
    return ranks.sum(sum(losses)) / words, norm


def _refuse_nonsense(step: int, loss: Tensor, norm: Tensor, precision: str) -> None:
    # In fp16 an overflowing gradient is the loss scaler's daily work: it leaves that step out.
    if not math.isfinite(loss.item()) or (precision != "fp16" and not math.isfinite(norm.item())):
        raise UserError(
            f"step {step:,}: loss {loss.item():g}, gradient norm {norm.item():g}, wanted numbers;"
            " lower train.lr, or set train.precision to bf16 or fp32; the checkpoints before it are whole"
        )


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


def _validate(job: Job, log: Log | None, bar: Bar) -> None:
    """Score the captions that the captioner now writes for the validation split."""
    # Greedy: five times as fast, and the order of checkpoints is the same.
    settings = job.config.with_beam(1).search
    job.ranks.share_buffers(job.captioner)
    results = caption_split(job.captioner, job.val_loader, settings, job.ranks, "validation")
    scores = job.ranks.on_first(_score, job.run, job.standing.step, results, job.val_loader.split)
    job.standing.judge(scores[job.config.train.score_metric])
    figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    bar.say(f"step {job.standing.step:,}  {figures}")
    if log:
        log.write(job.standing.step, scores=scores)


def _score(run: Path, step: int, results: list[Result], split: Split) -> dict[str, float]:
    write_results(results, run / "validation" / f"step-{step:08d}.json")
    captions = {result["image_id"]: result["caption"] for result in results}
    # Without METEOR, whose JVM takes ten seconds to start.
    return score(captions, split.references(), ("BLEU-4", "ROUGE-L", "CIDEr-D")).values


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
