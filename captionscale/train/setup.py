"""All that a training run works with, made ready: shards opened, captioner built or restored."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from captionscale import config as configs
from captionscale import toml, vocab
from captionscale.config import Config
from captionscale.data.loader import Batch, Items, Loader
from captionscale.data.sampler import Order
from captionscale.data.shards import Split
from captionscale.data.storage import Remote, open_place
from captionscale.distributed.engine import Engine, choose
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.files import atomic
from captionscale.model.captioner import Captioner
from captionscale.progress import Bar, progress, say, working
from captionscale.train import checkpoints
from captionscale.train.checkpoint_writer import Saver
from captionscale.train.ema import Average
from captionscale.train.feature_cache import cache_features
from captionscale.train.losses import CrossEntropy
from captionscale.train.optimizer import make_optimizer, unfreeze
from captionscale.train.run_folder import SETTINGS
from captionscale.train.scst import SelfCritical
from captionscale.train.scst_checks import IMAGES, open_gate
from captionscale.train.state import Standing
from captionscale.train.tracking import refuse_missing
from captionscale.vocab import Vocabulary


@dataclass(frozen=True)
class Job:
    """One rank's part of a run. Only `standing`, the weights and the optimiser's memory change."""

    config: Config
    run: Path
    ranks: Ranks
    order: Order
    loader: Loader
    val_loader: Loader
    vocabulary: Vocabulary
    captioner: Captioner
    objective: CrossEntropy | SelfCritical
    average: Average | None
    engine: Engine
    """What moves the captioner."""
    fingerprint: dict[str, Any]
    standing: Standing
    saver: Saver

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config.train.steps or self.config.train.epochs * self.order.steps_per_epoch

    def save(self) -> None:
        """Begin to write a checkpoint of where the run stands; it is on the disk after `wait_for_save`."""
        self.standing.scaler = self.engine.scaler_state()
        average = self.average.state() if self.average else None
        tensors = self.captioner.state_dict(), self.engine.memory(), average
        self.ranks.on_first(self.saver.save, self.standing, *tensors)

    def wait_for_save(self) -> None:
        """Return when the last checkpoint is on the disk."""
        self.ranks.on_first(self.saver.wait)

    def unfreeze(self, step: int) -> None:
        """Let the parts of the encoder learn whose step has come; all ranks call it before each step."""
        if unfreeze(self.captioner, self.config.train, step):
            self.engine.renew(make_optimizer(self.captioner, self.config.train))
            if self.ranks.first:
                say(f"step {step:,}: another part of model.encoder.trainable begins to learn")

    def shares(self) -> Iterator[tuple[int, list[tuple[int, Batch]]]]:
        """Yield the steps to come, each with the micro-batches that this rank does, by their numbers."""
        steps = range(self.standing.step, self.steps)
        batches = self.loader.ahead(self._requests(steps))
        for step in steps:
            yield step, [(number, next(batches)) for number, _ in self._micro_batches(step)]

    def shards(self, step: int, rank: int) -> list[str]:
        """Return the names of the shards that a rank reads for a step."""
        split = self.loader.split
        work = self.order.micro_batches(step, rank, self.ranks.size)
        rows = {int(row) for _, items in work for row in split.index["shard"][items]}
        return [split.facts.shards[row].name for row in sorted(rows)]

    def _requests(self, steps: range) -> Iterator[tuple[Items, int]]:
        for step in steps:
            for _, items in self._micro_batches(step):
                yield items, self.order.epoch(step)

    def _micro_batches(self, step: int) -> list[tuple[int, Items]]:
        return self.order.micro_batches(step, self.ranks.rank, self.ranks.size)


def prepare(config: Config, run: Path, ranks: Ranks, stack: ExitStack) -> Job:
    """Make a run ready for its next step: its first one, or the one after its newest checkpoint.

    Args:
        config: The experiment.
        run: Its folder, in which this process may write.
        ranks: This process among its peers.
        stack: Closes what is opened here.

    Raises:
        UserError: Shards, weights or an earlier run that do not fit.
    """
    settings, data = config.train, config.data
    ranks.on_first(refuse_missing, settings.trackers)
    place = open_place(data.shards, data.cache, data.cache_gb)
    split, val_split = Split(place, data.train_split), Split(place, data.val_split)
    for each in (split, val_split):
        ranks.on_first(each.need_captions, "to train; pack the data set with its captions")
    ranks.on_first(_refuse_differing, data.shards, ranks.gather([(split.sha256, val_split.sha256)]))
    order = order_of(split, config)
    if isinstance(place, Remote):
        ranks.on_first(_tell_of_cache, place, split, order, data)
    # All ranks would be refused alike; the first one says so.
    ranks.on_first(order.micro_batches, 0, 0, ranks.size)
    ranks.on_first(_refuse_uneven, order, ranks)
    vocabulary = ranks.on_first(_build_vocabulary, split, config)
    loader = Loader(split, vocabulary, data, config.seed)
    val_loader = Loader(val_split, vocabulary, data)
    stack.callback(loader.close)
    stack.callback(val_loader.close)

    ranks.on_first(_refuse_too_large, config, len(vocabulary))
    ranks.seed(config.seed)
    captioner = Captioner(config.model, len(vocabulary))
    fingerprint = _fingerprint(config, split, vocabulary)
    # Rank 0 chooses where to go on from, and all go on from there: another rank may not yet see the newest.
    saved = ranks.on_first(checkpoints.resume, run, fingerprint, say)
    if saved is None:
        ranks.on_first(_begin, captioner, vocabulary, settings.start_from)
    captioner.to(ranks.device).train()
    if settings.compile_encoder:
        captioner.encoder.compile_training()
    if saved is not None:
        captioner.load_state_dict(saved.weights(captioner))
    saver = Saver(run, config, vocabulary, fingerprint)
    stack.callback(saver.close)
    # While all parts of the encoder count as learning: it is to have room for them.
    ranks.on_first(saver.reserve, captioner)
    unfreeze(captioner, settings, saved.standing.step if saved else 0)
    engine = choose(
        ranks,
        captioner,
        make_optimizer(captioner, settings),
        settings.clip_norm,
        compress=settings.compress_gradients,
    )
    if settings.cache_features:
        # Now that all ranks have the weights of the first.
        cache_features(captioner.encoder, (loader, val_loader), ranks, settings.precision)
    average = Average(captioner, settings.average) if settings.average else None
    objective: CrossEntropy | SelfCritical = CrossEntropy(settings.label_smoothing)
    if settings.objective == "scst":
        with working("counting the n-grams of the train captions", quiet=not ranks.first):
            objective = SelfCritical(config, captioner, split, vocabulary)
        if saved is None:
            ranks.on_first(_look_ahead, config, captioner, loader, objective, ranks)
    ranks.on_first(_keep_settings, run, config)
    standing = Standing()
    if saved is not None:
        standing = saved.standing
        engine.load_memory(saved.memory(captioner))
        engine.load_scaler_state(standing.scaler)
        if average:
            average.load(saved.average(captioner))
    return Job(
        config,
        run,
        ranks,
        order,
        loader,
        val_loader,
        vocabulary,
        captioner,
        objective,
        average,
        engine,
        fingerprint,
        standing,
        saver,
    )


def _refuse_too_large(config: Config, words: int) -> None:
    with torch.device("meta"):
        weights = Captioner(config.model, words).state_dict().values()
    needed, there = sum(each.nbytes for each in weights), psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"model: its weights take {needed / 1e9:,.1f} GB, this machine has {there / 1e9:,.1f} GB of"
            " memory, expected less, as training takes several times as much; lower model.decoder.hidden,"
            " embed or layers"
        )


def _begin(captioner: Captioner, vocabulary: Vocabulary, source: Path | None) -> None:
    """Give a run its first weights: those of another run, or random ones with a pretrained encoder."""
    if source is None:
        captioner.load_pretrained()
        return
    saved = checkpoints.open_run(source)
    if saved.vocabulary() != vocabulary:
        raise UserError(
            f"train.start_from = {source}: has {len(saved.vocabulary()):,} words, here they are other"
            f" {len(vocabulary):,}; take the same shards, data.min_count and data.max_vocabulary, or train"
            " anew"
        )
    weights, wanted = saved.weights() | saved.average(), captioner.state_dict()
    differing = [
        name
        for name in sorted(weights.keys() | wanted.keys())
        if name not in weights or name not in wanted or weights[name].shape != wanted[name].shape
    ]
    if differing:
        raise UserError(
            f"train.start_from = {source}: {len(differing):,} weights are of another model, the first"
            f" '{differing[0]}'; take the section model of {saved.folder / 'config.toml'}"
        )
    captioner.load_state_dict(weights)
    say(f"starting from {saved.folder}")


def _look_ahead(
    config: Config, captioner: Captioner, loader: Loader, objective: SelfCritical, ranks: Ranks
) -> None:
    """Let self-critical training show on some images that it can learn."""
    items = np.arange(min(IMAGES, len(loader.split)))
    (batch,) = loader.ahead([(items, None)])
    with ranks.autocast():
        open_gate(
            objective,
            captioner,
            batch.to(ranks.device),
            loader.vocabulary,
            config.data.max_words,
        )


def _keep_settings(run: Path, config: Config) -> None:
    """Write down what the run is trained with, for who looks at it before the first checkpoint."""
    with atomic(run / SETTINGS) as file:
        file.write(toml.dumps(config).encode())


def order_of(split: Split, config: Config) -> Order:
    """Return the order in which an experiment learns from a split.

    Raises:
        UserError: Too few samples for its batches.
    """
    sizes, train = tuple(split.shard_sizes.tolist()), config.train
    return Order(sizes, config.seed, train.global_batch, train.micro_batch, config.data.shuffle_shards)


def _refuse_differing(shards: str, read: list[tuple[str, str]]) -> None:
    # Each machine may have a copy of its own, and one of them an older one.
    if others := [str(rank) for rank, hashes in enumerate(read) if hashes != read[0]]:
        raise UserError(
            f"{shards}: rank {', '.join(others)} finds other shards there than rank 0, wanted the same on all"
            " machines; copy or pack them there again"
        )


def _refuse_uneven(order: Order, ranks: Ranks) -> None:
    # ZeRO-2 sums gradients in each backward pass, so that each rank must do as many as the others.
    if ranks.zero is not None and order.streams % ranks.size:
        raise UserError(
            f"train.global_batch = {order.global_batch} holds {order.streams} micro-batches of"
            f" train.micro_batch = {order.micro_batch}, which {ranks.size} processes cannot share evenly, as"
            " ZeRO wants; start a number of processes that divides them, or take --profile gpu"
        )


def _tell_of_cache(place: Remote, split: Split, order: Order, data: configs.Data) -> None:
    say(f"shards of {place} are kept in {place.cache}")
    # What all streams shuffle at a time; a node among several reads only its part of them.
    shards = min(len(split.facts.shards), order.streams * data.shuffle_shards)
    needed_gb = shards * max(shard.size_bytes for shard in split.facts.shards) / 1e9
    if needed_gb > data.cache_gb:
        say(
            f"warning: data.cache_gb = {data.cache_gb:g}, but the {shards:,} shards that are read at a time"
            f" take {needed_gb:.3g} GB; with less room on one node they are downloaded again and again; raise"
            " it"
        )


def _build_vocabulary(split: Split, config: Config) -> Vocabulary:
    with progress("reading captions", len(split), passing=True) as bar:
        captions = (caption for item in _counted(range(len(split)), bar) for caption in split.captions(item))
        return vocab.build(captions, config.data.min_count, config.data.max_vocabulary)


def _counted(items: range, bar: Bar) -> Iterator[int]:
    for item in items:
        yield item
        bar.advance()


def _fingerprint(config: Config, split: Split, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return what may not change within a run, and nothing else: not ranks, nodes, workers or paths."""
    settings = toml.flatten(config.model_dump(mode="json", include={"seed", "data", "model"}))
    for free in ("data.shards", "data.cache", "data.cache_gb", "data.workers", "model.encoder.weights"):
        del settings[free]
    kept = {"global_batch", "micro_batch", "score_metric", "objective", "average", "start_from"}
    train = toml.flatten({"train": config.train.model_dump(mode="json", include=kept)})
    scst = {f"scst.{key}": value for key, value in config.scst if config.train.objective == "scst"}
    return {"shards": split.sha256, "vocabulary": vocabulary.sha256, **settings, **train, **scst}
