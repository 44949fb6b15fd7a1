"""Speed on a GPU: steps, beam search, the loader, self-critical training, a profile."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import simplejpeg
import torch
from decode import random_decoder
from gpu_model import (
    DEVICE,
    GPU,
    PRECISION,
    Report,
    build_model,
    load_config,
    random_batch,
    synchronize,
    train_step,
)
from synthetic_run import COCO_WORDS, write_shards

from captionscale.config_model import AttentionConfig
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.distributed.ranks import Ranks
from captionscale.model.search.generate import search
from captionscale.train import profiling
from captionscale.train.losses import Target
from captionscale.train.preemption import PreemptionFlag
from captionscale.train.scst import ScstObjective
from captionscale.train.step import micro_batch_loss
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary


def _seconds(run: Callable[[], object], times: int, warm_up: int = 1) -> list[float]:
    """Return the wall time of each of some runs, the GPU's work included."""
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def step_time(report: Report, _: Path, tiny: bool) -> None:
    """Measure a step and its parts by micro-batch size, in bf16 (fp32 without a GPU)."""
    words, steps, warm_up = (50, 1, 1) if tiny else (COCO_WORDS, 30, 8)
    for size in (2,) if tiny else (8, 16, 32, 64, 128, 256):
        config = load_config(
            tiny, "train.ema_decay=0.999", f"train.micro_batch={size}", f"train.global_batch={size}"
        )
        pixels = config.data.image_size
        with Ranks(PRECISION) as ranks:
            model, flag = build_model(config, words, ranks), PreemptionFlag()
            batches = [random_batch(size, words, pixels, seed=seed) for seed in range(min(4, steps))]
            numbers = iter(range(10**6))

            def step(
                model: Any = model, flag: Any = flag, batches: Any = batches, numbers: Any = numbers
            ) -> None:
                number = next(numbers)
                train_step(model, number, [batches[number % len(batches)]], flag)

            for _number in range(warm_up):
                step()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            started = time.perf_counter()
            for _number in range(steps):
                step()
            synchronize()
            step_s = (time.perf_counter() - started) / steps
            host_s = []
            # How long the host takes to launch a step while the GPU is idle.
            for _number in range(min(5, steps)):
                synchronize()
                started = time.perf_counter()
                step()
                host_s.append(time.perf_counter() - started)
            memory = torch.cuda.max_memory_allocated() / 1e9 if GPU else 0.0
            report.add(
                "step",
                micro_batch=size,
                step_ms=1000 * step_s,
                images_s=size / step_s,
                host_ms=1000 * median(host_s),
                memory_gb=memory,
            )
            for name, part in _parts(model, batches[0].to(ranks.device), size):
                milliseconds = 1000 * median(_seconds(part, 1 if tiny else 10))
                report.add("step", micro_batch=size, part=name, ms=milliseconds)


def _parts(model: Any, batch: Any, size: int) -> Iterator[tuple[str, Callable[[], object]]]:
    captioner, ranks = model.captioner, model.ranks
    with torch.no_grad(), ranks.autocast():
        features = captioner.encode(batch.images[:1]).float().repeat(size, 1, 1).requires_grad_()

    def encode() -> None:
        with ranks.autocast():
            captioner.encoder(batch.images).float().sum().backward()

    def decoder(_images: Any, tokens: Any, lengths: Any, image_index: Any, _prob: float) -> Any:
        with ranks.autocast():
            return captioner.decoder.teacher_forced(features, tokens, lengths, image_index)

    def decode() -> None:
        target = Target(batch.images, batch.tokens, batch.image_index, lengths=batch.lengths)
        loss = micro_batch_loss(decoder, target, target.num_tokens.float(), label_smoothing=0.1)
        torch.autograd.backward(loss)

    yield "encoder, forward and backward", encode
    yield "decoder and loss, forward and backward", decode
    yield "clipping and AdamW", lambda: model.engine.step()


def beam_search(report: Report, _: Path, tiny: bool) -> None:
    """Measure beam search of features by beam size, number of images and precision."""
    torch.manual_seed(0)
    words, size = (50, 64) if tiny else (COCO_WORDS, 2048)
    settings = (
        AttentionConfig(embed_size=32, hidden_size=32, attention_size=16) if tiny else AttentionConfig()
    )
    decoder = random_decoder(settings, size, words).to(DEVICE)
    for precision in ("fp32", "bf16") if GPU else ("fp32",):
        for beam in (1, 5):
            for count in (2,) if tiny else (1, 32, 128, 512):
                features = (torch.randn(count, 1, size) + torch.randn(count, 49, size)).relu().to(DEVICE)

                def run(features: Any = features, beam: int = beam) -> object:
                    return search(decoder, features, beam=beam, max_words=20, length_penalty=0.7)

                with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
                    seconds = median(_seconds(run, 1 if tiny else 5))
                report.add(
                    "beam_search",
                    precision=precision,
                    beam=beam,
                    images=count,
                    ms=1000 * seconds,
                    images_s=count / seconds,
                )


def loader(report: Report, folder: Path, tiny: bool) -> None:
    """Measure loading by threads and color jitter, of a noisy image as large as COCO's with 256 pixels."""
    shards = write_shards(folder / "loader", {"train": 16 if tiny else 512}, 64)
    across, down = np.meshgrid(np.arange(341), np.arange(256))
    image = np.stack([across + down, 2 * across, 3 * down], 2) % 256
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 9, image.shape), 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(noisy), 90)
    split = Split(shards, "train")
    split.image = lambda _: jpeg  # type: ignore[method-assign, assignment]
    items = np.random.default_rng(0).permutation(len(split))
    for threads in (2,) if tiny else (1, 4, 8, 16):
        for jitter in (0.0, 0.2):
            config = load_config(tiny, f"data.workers={threads}", f"data.color_jitter={jitter}")
            each = Loader(split, Vocabulary((*SPECIAL_TOKENS, "a")), config.data)
            batches = each.prefetch((np.roll(items, -start)[:16], 0) for start in range(0, 10**9, 16))
            next(batches)
            started, count = time.perf_counter(), 0
            while (seconds := time.perf_counter() - started) < (0.1 if tiny else 3):
                count += len(next(batches).images)
            each.close()
            report.add(
                "loader", bytes=len(jpeg), threads=threads, color_jitter=jitter, images_s=count / seconds
            )


class _Captions:
    """Random captions, as far as the reward asks for a split."""

    def __init__(self, images: int, words: int):
        random = np.random.default_rng(0)
        self.index = {"image_id": np.arange(images)}
        self._tokens = np.minimum(random.zipf(1.3, (images, 5, 10)), words - 1)

    def __len__(self) -> int:
        return len(self._tokens)

    def captions(self, item: int) -> list[str]:
        """Return an image's captions."""
        return [" ".join(f"word{token}" for token in caption) for caption in self._tokens[item]]


def self_critical(report: Report, _: Path, tiny: bool) -> None:
    """Measure the parts of a self-critical step, one after another, on features."""
    words, images, regions = (50, 16, 4) if tiny else (COCO_WORDS, 1024, 49)
    vocabulary = Vocabulary(
        (*SPECIAL_TOKENS, *(f"word{number}" for number in range(words - len(SPECIAL_TOKENS))))
    )
    for size in (2,) if tiny else (16, 64, 256):
        overrides = [
            "model.encoder.trainable=none",
            "train.objective=scst",
            "train.init_from=none",
            "train.lr=5e-5",
        ]
        overrides += [f"train.micro_batch={size}", f"train.global_batch={size}"]
        config = load_config(tiny, *overrides)
        with Ranks(PRECISION) as ranks:
            model = build_model(config, words, ranks)
            split: Any = _Captions(images, words)
            model.objective = ScstObjective(config, model.captioner, split, vocabulary)
            features = (regions, model.captioner.encoder.feature_size)
            batch = random_batch(size, words, features).to(ranks.device)
            steps = [_scst_step(model, batch, step) for step in range(2 if tiny else 6)][1:]
        parts = {f"{part}_ms": 1000 * median(step[part] for step in steps) for part in steps[0]}
        total = median(sum(step.values()) for step in steps)
        report.add("self_critical", images=size, samples=5, **parts, images_s=size / total)


def _scst_step(model: SimpleNamespace, batch: Any, step: int) -> dict[str, float]:
    """Take a step as the loop does, but one part after another; return their seconds."""
    times = [time.perf_counter()]

    def lap() -> None:
        synchronize()
        times.append(time.perf_counter())

    (target,) = model.objective.targets([(0, batch)], step, model.ranks)
    lap()
    advantages = target.advantages()
    target = replace(target, advantages=lambda: advantages)
    lap()
    weight = model.objective.cross_entropy_weight
    model.engine.backward(
        micro_batch_loss(model.engine, target, target.num_tokens.float(), cross_entropy_weight=weight)
    )
    model.engine.step()
    lap()
    seconds = [after - before for before, after in pairwise(times)]
    return dict(zip(("sampling", "reward", "update"), seconds, strict=True))


def profile(report: Report, folder: Path, tiny: bool) -> None:
    """Write traces at two micro-batch sizes, and count kernel launches."""
    words = 50 if tiny else COCO_WORDS
    for size in (2,) if tiny else (16, 128):
        config = load_config(tiny)
        with Ranks(PRECISION) as ranks:
            model, flag = build_model(config, words, ranks), PreemptionFlag()
            batch = random_batch(size, words, config.data.image_size)
            traces = folder / f"profile-{size}"
            traces.mkdir()
            steps = 1 if tiny else 3
            with profiling.profiling(traces, steps, 0, print) as after_step:
                for step in range(profiling.WARMUP_STEPS + steps + 1):
                    train_step(model, step, [batch], flag)
                    after_step()
            for trace in traces.glob("profile/*.gz"):
                shutil.move(trace, report.folder / f"trace-{size}.json.gz")
            with torch.profiler.profile() as profiler:
                train_step(model, 99, [batch], flag)
                synchronize()
        events = profiler.key_averages()
        launches = sum(each.count for each in events if "LaunchKernel" in each.key)
        busy_ms = sum(each.self_device_time_total for each in events) / 1000
        report.add("profile", micro_batch=size, kernel_launches=launches, device_busy_ms=float(busy_ms))
