"""The training loop."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from torch.optim import AdamW

from captionscale import config as configs
from captionscale import vocab
from captionscale.config import Config, Search
from captionscale.data.loader import Batch, Items, Loader
from captionscale.data.order import Order
from captionscale.data.shards import Split
from captionscale.errors import UserError
from captionscale.files import lock
from captionscale.model.captioner import Captioner
from captionscale.progress import progress, say
from captionscale.ranks import Ranks
from captionscale.score.evaluate import Result, caption_split, write_results
from captionscale.score.metrics import score
from captionscale.train import checkpoint
from captionscale.train.checkpoint import Standing
from captionscale.train.logs import Log
from captionscale.train.losses import cross_entropy
from captionscale.train.schedule import lr_factor
from captionscale.vocab import Vocabulary


def train(config: Config, run: Path) -> Standing:
    """Train a captioner, or go on with one.

    Args:
        config: The experiment.
        run: Folder of its checkpoints and logs. If it holds a checkpoint, training goes on from there.

    Returns:
        How far the run is now: at its last step, or where early stopping ended it.

    Raises:
        UserError: Shards, weights or an earlier run that do not fit, or a run that another process writes.
    """
    ranks = Ranks(config.train.precision)
    with ExitStack() as stack:
        stack.callback(ranks.leave)
        ranks.on_first(stack.enter_context, lock(run, "captionscale train"))
        return _train(config, run, ranks, stack)


def _train(config: Config, run: Path, ranks: Ranks, stack: ExitStack) -> Standing:
    settings, shards = config.train, config.data.shards
    split = Split(shards, config.data.train_split)
    order = Order(
        tuple(split.shard_sizes.tolist()),
        config.seed,
        settings.global_batch,
        settings.micro_batch,
        config.data.shuffle_shards,
    )
    # All ranks would be refused alike; the first one says so.
    ranks.on_first(order.micro_batches, 0, 0, ranks.size)
    vocabulary = ranks.on_first(_build_vocabulary, split, config)
    loader = Loader(split, vocabulary, config.data, config.seed)
    val_loader = Loader(Split(shards, config.data.val_split), vocabulary, config.data)
    stack.callback(loader.close)
    stack.callback(val_loader.close)

    ranks.seed(config.seed)
    captioner = Captioner(config.model, len(vocabulary))
    tell = say if ranks.first else _silence
    saved = checkpoint.newest(run, tell)
    if saved is None:
        captioner.load_pretrained()
    captioner.to(ranks.device).train()
    optimizer = _optimizer(captioner, settings)
    standing = Standing()
    fingerprint = _fingerprint(config, split, vocabulary)
    if saved is not None:
        saved.restore(fingerprint, captioner, optimizer)
        standing = saved.standing
        ranks.load_scaler_state(standing.scaler)
        tell(f"{run}: going on from step {standing.step:,}")
    model, stepper = ranks.prepare(captioner, optimizer)

    start, steps = standing.step, settings.epochs * order.steps_per_epoch
    score_every = settings.score_every or order.steps_per_epoch
    save_every = settings.save_every or order.steps_per_epoch
    log = stack.enter_context(closing(Log(run, start))) if ranks.first else None
    batches = loader.ahead(_requests(order, ranks, range(start, steps)))
    rate = _Rate()
    with progress("training", steps, start, quiet=not ranks.first) as bar:
        for step in range(start, steps):
            if standing.scores_since_best >= settings.patience:
                bar.say(f"stopping: no better {settings.score_metric} since step {standing.best_step:,}")
                break
            numbers = [number for number, _ in order.micro_batches(step, ranks.rank, ranks.size)]
            share = [next(batches) for _ in numbers]
            words = ranks.sum(sum(batch.words for batch in share))
            factor = lr_factor(step, steps, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            losses = []
            for number, batch in ranks.last_one_syncs(zip(numbers, share, strict=True), model):
                here = batch.to(ranks.device)
                ranks.seed(config.seed, step, number)
                with ranks.autocast():
                    logits, _ = model(here.images, here.tokens[:, :-1], here.owners)
                loss = cross_entropy(logits, here.tokens[:, 1:], settings.label_smoothing)
                ranks.backward(loss * ranks.size / words)
                losses.append(loss.detach())
            norm = ranks.clip(captioner, settings.clip_norm)
            stepper.step()
            stepper.zero_grad()

            done = standing.step = step + 1
            last = done == steps
            rate.count(share)
            if done % settings.log_every == 0 or last:
                values = {"loss": (ranks.sum(sum(losses)) / words).item(), "lr": factor * settings.lr}
                values |= {"gradient_norm": norm.item(), **rate.read(ranks)}
                _refuse_nonsense(done, values["loss"])
                bar.note(_NOTE.format_map(values))
                if log:
                    log.write(done, epoch=done / order.steps_per_epoch, **values)
            if done % score_every == 0 or last:
                results = caption_split(captioner, val_loader, _GREEDY, ranks, "validation")
                scores = ranks.on_first(_score, run, done, results, val_loader.split)
                _judge(standing, scores[settings.score_metric])
                bar.say(_line(done, scores))
                if log:
                    log.write(done, scores=scores)
                rate.restart()
            if done % score_every == 0 or done % save_every == 0 or last:
                standing.scaler = ranks.scaler_state()
                ranks.on_first(
                    checkpoint.save, run, standing, fingerprint, captioner, optimizer, config, vocabulary
                )
            bar.advance()
    tell(
        f"{run}: {standing.step:,} of {steps:,} steps done, the best {settings.score_metric}"
        f" {standing.best_score:.4f} at step {standing.best_step:,}"
    )
    return standing


_NOTE = "loss {loss:.3f}  {images_per_s:,.0f} images/s  {captions_per_s:,.0f} captions/s"
# Validation is greedy: five times as fast, and the order of checkpoints is the same.
_GREEDY = Search(beam=1)
_VALIDATION_METRICS = ("BLEU-4", "ROUGE-L", "CIDEr-D")


def _silence(_: str) -> None:
    """Be a rank that does not speak."""


def _build_vocabulary(split: Split, config: Config) -> Vocabulary:
    captions = (caption for item in range(len(split)) for caption in split.captions(item))
    return vocab.build(captions, config.data.min_count, config.data.max_vocabulary)


def _requests(order: Order, ranks: Ranks, steps: range) -> Iterator[tuple[Items, int]]:
    """Yield what this rank reads in these steps, micro-batch after micro-batch."""
    for step in steps:
        for _, items in order.micro_batches(step, ranks.rank, ranks.size):
            yield items, order.epoch(step)


def _optimizer(captioner: Captioner, settings: configs.Train) -> AdamW:
    """Return AdamW over what learns: encoder and decoder at their own rates, decay on matrices only."""
    groups = []
    for part, lr in ((captioner.encoder, settings.encoder_lr), (captioner.decoder, settings.lr)):
        learning = [parameter for parameter in part.parameters() if parameter.requires_grad]
        for matrices, decay in ((True, settings.weight_decay), (False, 0.0)):
            members = [parameter for parameter in learning if (parameter.ndim > 1) == matrices]
            if members:
                groups.append({"params": members, "peak_lr": lr, "weight_decay": decay})
    return AdamW(groups, fused=True)


def _fingerprint(config: Config, split: Split, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return what may not change within a run, and nothing else: not ranks, nodes, workers or paths."""
    settings = configs.flatten(config.model_dump(mode="json", include={"seed", "data", "model"}))
    for free in ("data.shards", "data.workers", "model.encoder.weights"):
        del settings[free]
    train = {f"train.{key}": getattr(config.train, key) for key in ("global_batch", "micro_batch")}
    return {"shards": split.sha256, "vocabulary": vocabulary.sha256, **settings, **train}


def _score(run: Path, step: int, results: list[Result], split: Split) -> dict[str, float]:
    write_results(results, run / "validation" / f"step-{step:08d}.json")
    captions = {result["image_id"]: result["caption"] for result in results}
    return score(captions, split.references(), _VALIDATION_METRICS).values


def _refuse_nonsense(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"step {step:,}: the loss is {loss}, wanted a number; lower train.lr, or set train.precision to"
            " bf16 or fp32; the checkpoints before it are whole"
        )


def _judge(standing: Standing, found: float) -> None:
    """Take a validation score into account."""
    better = found > standing.best_score
    standing.scores_since_best = 0 if better else standing.scores_since_best + 1
    if better:
        standing.best_score, standing.best_step = found, standing.step


def _line(step: int, scores: dict[str, float]) -> str:
    figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    return f"step {step:,}  {figures}"


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
