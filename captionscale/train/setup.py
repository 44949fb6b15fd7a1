"""Set-up of a training run: open the shards, build or restore the captioner."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from captionscale import config as configs
from captionscale import toml, vocab
from captionscale.config import Config
from captionscale.data.loader import Batch, Items, Loader
from captionscale.data.sampler import BatchSampler
from captionscale.data.shards import Split
from captionscale.data.storage import RemoteStorage, open_storage
from captionscale.distributed.engine import Engine, create_engine
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.files import atomic_write
from captionscale.model.captioner import Captioner
from captionscale.model.encoders.encoder import interpolation_of
from captionscale.progress import progress, say, spinner
from captionscale.train.checkpoint import open_checkpoint, resume
from captionscale.train.checkpoint_writer import CheckpointWriter
from captionscale.train.ema import ModelEMA
from captionscale.train.feature_cache import cache_features
from captionscale.train.fingerprint import make_fingerprint
from captionscale.train.objective import Objective, objective_class
from captionscale.train.optimizer import make_optimizer, unfreeze
from captionscale.train.run_folder import CONFIG_FILE
from captionscale.train.state import TrainState
from captionscale.train.tracking import check_trackers_installed
from captionscale.vocab import Vocabulary


@dataclass(frozen=True)
class Run:
    """A run on one rank. Only `train_state`, the weights and the optimizer state change."""

    config: Config
    folder: Path
    ranks: Ranks
    sampler: BatchSampler
    loader: Loader
    val_loader: Loader
    vocabulary: Vocabulary
    captioner: Captioner
    objective: Objective
    ema: ModelEMA | None
    engine: Engine
    train_state: TrainState
    checkpoint_writer: CheckpointWriter

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return total_steps(self.config, self.sampler)

    def save(self) -> None:
        """Begin to write a checkpoint; it is on disk after `wait_for_save`."""
        self.train_state.scaler = self.engine.scaler_state()
        tensors = [self.captioner.state_dict(), self.engine.optimizer_state()]
        if self.ema:
            tensors.append(self.ema.state_dict())
        self.ranks.run_on_main(self.checkpoint_writer.save, self.train_state, *tensors)

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self.ranks.run_on_main(self.checkpoint_writer.wait)

    def unfreeze(self, step: int) -> None:
        """Unfreeze the parts of the encoder due at a step; all ranks call it before each step."""
        if unfreeze(self.captioner, self.config.train, step):
            self.engine.replace_optimizer(make_optimizer(self.captioner, self.config.train))
            if self.ranks.is_main:
                say(f"step {step:,}: unfreezing another part of model.encoder.trainable")

    def steps_with_batches(self) -> Iterator[tuple[int, list[tuple[int, Batch]]]]:
        """Yield the remaining steps, each with this rank's micro-batches and their numbers."""
        steps = range(self.train_state.step, self.steps)
        batches = self.loader.prefetch(
            (items, self.sampler.epoch(step))
            for step in steps
            for _, items in self._micro_batches(step, self.ranks.rank)
        )
        for step in steps:
            yield step, [(number, next(batches)) for number, _ in self._micro_batches(step, self.ranks.rank)]

    def shards(self, step: int, rank: int) -> list[str]:
        """Return the names of the shards that a rank reads in a step."""
        split = self.loader.split
        rows = {
            int(row) for _, items in self._micro_batches(step, rank) for row in split.index["shard"][items]
        }
        return [split.info.shards[row].name for row in sorted(rows)]

    def _micro_batches(self, step: int, rank: int) -> list[tuple[int, Items]]:
        return self.sampler.micro_batches(step, rank, self.ranks.world_size)


def build_run(config: Config, folder: Path, ranks: Ranks, stack: ExitStack) -> Run:
    """Prepare a run for its next step: the first, or the one after its newest checkpoint.

    Raises:
        UserError: Shards, weights or an earlier run that do not fit.
    """
    settings = config.train
    ranks.run_on_main(check_trackers_installed, settings.trackers)
    split, val_split, sampler = _open_splits(config, ranks)
    vocabulary = ranks.run_on_main(_build_vocabulary, split, config)
    interpolation = interpolation_of(config.model)
    loader = Loader(split, vocabulary, config.data, config.seed, interpolation=interpolation)
    val_loader = Loader(val_split, vocabulary, config.data, interpolation=interpolation)
    stack.callback(loader.close)
    stack.callback(val_loader.close)

    ranks.run_on_main(_refuse_too_large, config, len(vocabulary))
    ranks.seed(config.seed)
    captioner = Captioner(config.model, len(vocabulary))
    fingerprint = make_fingerprint(config, shards=split.sha256, vocabulary=vocabulary.sha256)
    # Rank 0 chooses the checkpoint: another rank may not see the newest one yet.
    saved = ranks.run_on_main(resume, folder, fingerprint)
    if saved is None:
        ranks.run_on_main(_load_initial_weights, captioner, vocabulary, settings.init_from)
    captioner.to(ranks.device).train()
    if settings.compile_encoder:
        captioner.encoder.compile_training()
    if saved is not None:
        saved.shape_model = captioner
        captioner.load_state_dict(saved.weights())
    writer = CheckpointWriter(folder, config, vocabulary, fingerprint)
    stack.callback(writer.close)
    # Before parts of the encoder are frozen: their optimizer state will take space too.
    ranks.run_on_main(writer.reserve, captioner)
    unfreeze(captioner, settings, saved.train_state.step if saved else 0)
    engine = create_engine(
        ranks,
        captioner,
        make_optimizer(captioner, settings),
        settings.clip_norm,
        compress_gradients=settings.compress_gradients,
    )
    if settings.cache_features:
        # After the engine has given all ranks the weights of rank 0.
        cache_features(captioner.encoder, (loader, val_loader), ranks, settings.precision)
    ema = ModelEMA(captioner, settings.ema_decay) if settings.ema_decay else None
    with spinner("preparing the objective", quiet=not ranks.is_main):
        objective = objective_class(settings.objective)(config, captioner, split, vocabulary)
    state = TrainState()
    if saved is None:
        ranks.run_on_main(_check_start, objective, loader, ranks)
    else:
        state = saved.train_state
        engine.load_optimizer_state(saved.optimizer_state())
        engine.load_scaler_state(state.scaler)
        if ema:
            ema.load_state_dict(saved.ema_weights())
    ranks.run_on_main(_write_config, folder, config)
    return Run(
        config=config,
        folder=folder,
        ranks=ranks,
        sampler=sampler,
        loader=loader,
        val_loader=val_loader,
        vocabulary=vocabulary,
        captioner=captioner,
        objective=objective,
        ema=ema,
        engine=engine,
        train_state=state,
        checkpoint_writer=writer,
    )


def make_sampler(split: Split, config: Config) -> BatchSampler:
    """Return the order of samples; raise UserError if a split has too few for the batches."""
    sizes, train = tuple(split.shard_sizes.tolist()), config.train
    return BatchSampler(
        sizes, config.seed, train.global_batch, train.micro_batch, config.data.shuffle_window_shards
    )


def total_steps(config: Config, sampler: BatchSampler) -> int:
    """Return the number of steps of a whole run."""
    return config.train.steps or config.train.epochs * sampler.steps_per_epoch


def _open_splits(config: Config, ranks: Ranks) -> tuple[Split, Split, BatchSampler]:
    data = config.data
    storage = open_storage(data.shards, data.cache, data.cache_gb)
    split, val_split = Split(storage, data.train_split), Split(storage, data.val_split)
    for each in (split, val_split):
        ranks.run_on_main(each.require_captions, "to train; pack the data set with its captions")
    ranks.run_on_main(_refuse_differing, data.shards, ranks.gather([(split.sha256, val_split.sha256)]))
    sampler = make_sampler(split, config)
    if isinstance(storage, RemoteStorage):
        ranks.run_on_main(_report_cache, storage, split, sampler, data)
    # All ranks would be refused alike; rank 0 reports it.
    ranks.run_on_main(sampler.micro_batches, 0, 0, ranks.world_size)
    ranks.run_on_main(_refuse_uneven, sampler, ranks)
    return split, val_split, sampler


def _refuse_too_large(config: Config, vocab_size: int) -> None:
    with torch.device("meta"):
        weights = Captioner(config.model, vocab_size).state_dict().values()
    needed, memory = sum(each.nbytes for each in weights), psutil.virtual_memory().total
    if needed > memory:
        raise UserError(
            f"model: its weights take {needed / 1e9:,.1f} GB, this machine has {memory / 1e9:,.1f} GB of"
            " memory, expected less, as training takes several times as much; lower"
            " model.decoder.hidden_size, embed_size or num_layers"
        )


def _load_initial_weights(captioner: Captioner, vocabulary: Vocabulary, source: Path | None) -> None:
    """Load the weights of another run, or a pretrained encoder."""
    if source is None:
        captioner.encoder.load_pretrained()
        return
    saved = open_checkpoint(source)
    if saved.vocabulary() != vocabulary:
        raise UserError(
            f"train.init_from = {source}: its vocabulary of {len(saved.vocabulary()):,} words is not this"
            f" run's of {len(vocabulary):,}, expected the same; take the same shards, data.min_count and"
            " data.max_vocab_size, or train from scratch"
        )
    weights, expected = saved.weights() | saved.ema_weights(), captioner.state_dict()
    shapes, expected_shapes = ({name: each.shape for name, each in it.items()} for it in (weights, expected))
    if differing := sorted({name for name, _ in shapes.items() ^ expected_shapes.items()}):
        raise UserError(
            f"train.init_from = {source}: {len(differing):,} weights are of another model, the first"
            f" '{differing[0]}'; take the section model of {saved.folder / CONFIG_FILE}"
        )
    captioner.load_state_dict(weights)
    say(f"starting from {saved.folder}")


def _check_start(objective: Objective, loader: Loader, ranks: Ranks) -> None:
    items = np.arange(min(objective.check_images, len(loader.split)))
    if len(items):
        (batch,) = loader.prefetch([(items, None)])
        with ranks.autocast():
            objective.check_start(batch.to(ranks.device))


def _write_config(folder: Path, config: Config) -> None:
    with atomic_write(folder / CONFIG_FILE) as file:
        file.write(toml.dumps(config).encode())


def _refuse_differing(shards: str, read: list[tuple[str, str]]) -> None:
    # Each machine may have its own copy, one of them older.
    if others := [str(rank) for rank, hashes in enumerate(read) if hashes != read[0]]:
        raise UserError(
            f"{shards}: rank {', '.join(others)} finds other shards there than rank 0, expected the same on"
            " all machines; copy or pack them there again"
        )


def _refuse_uneven(sampler: BatchSampler, ranks: Ranks) -> None:
    # ZeRO-2 reduces gradients in each backward pass, so all ranks must do equally many.
    if ranks.zero_stage is not None and sampler.micro_batches_per_step % ranks.world_size:
        raise UserError(
            f"train.global_batch = {sampler.global_batch} holds {sampler.micro_batches_per_step}"
            f" micro-batches of train.micro_batch = {sampler.micro_batch}, which {ranks.world_size} processes"
            " cannot share evenly, as ZeRO requires; start a number of processes that divides them, or take"
            " --profile gpu"
        )


def _report_cache(storage: RemoteStorage, split: Split, sampler: BatchSampler, data: configs.Data) -> None:
    say(f"shards of {storage} are kept in {storage.cache}")
    # The shards that all streams shuffle at a time; each of several nodes reads only its part.
    shards = min(len(split.info.shards), sampler.micro_batches_per_step * data.shuffle_window_shards)
    needed_gb = shards * max(shard.size_bytes for shard in split.info.shards) / 1e9
    if needed_gb > data.cache_gb:
        say(
            f"warning: data.cache_gb = {data.cache_gb:g}, but the {shards:,} shards that are read at a time"
            f" take {needed_gb:.3g} GB; one node downloads them again and again; raise it"
        )


def _build_vocabulary(split: Split, config: Config) -> Vocabulary:
    with progress("reading captions", len(split), transient=True) as bar:

        def captions() -> Iterator[str]:
            for item in range(len(split)):
                yield from split.captions(item)
                bar.advance()

        return vocab.build(captions(), config.data.min_count, config.data.max_vocab_size)
