"""The training loop's own step next to a bare one: forward, backward, clipping, AdamW."""

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from comparison import Table
from synthetic_run import change_train
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.model.decoders.decoder import packed_index
from captionscale.train import loop
from captionscale.train.setup import Run, build_run
from captionscale.vocab import PAD

Share = list[tuple[int, Batch]]

_WARM_UP, _BATCHES = 5, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NoValidation:
    """Validation needs Java, takes seconds and is not measured."""

    out_of_patience = False

    def __init__(self, *_: Any) -> None:
        pass

    def run(self) -> bool:
        """Do nothing."""
        return True

    def log_scores(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class _Alternating(Run):
    """A run that takes its own step and a bare one in turn, on the same batches in memory."""

    work: list[Share]
    bare: Callable[[Share], object]
    seconds: list[tuple[float, float]]
    """Of each step: ours, bare."""

    def steps_with_batches(self) -> Iterator[tuple[int, Share]]:
        """Yield the steps; the loop's step is what happens until the next one is asked for."""
        for step in range(self.steps):
            share = self.work[step % len(self.work)]
            # The first of the two finds other data in the caches, so they take turns.
            first = self._time_bare(share) if step % 2 else 0.0
            start = time.perf_counter()
            yield step, share
            ours = time.perf_counter() - start
            self.seconds.append((ours, first or self._time_bare(share)))

    def _time_bare(self, share: Share) -> float:
        start = time.perf_counter()
        self.bare(share)
        return time.perf_counter() - start


def loop_overhead(settings: Config, folder: Path, pairs: int) -> Table:
    """Compare the training loop's step with a bare one.

    Args:
        settings: The experiment.
        folder: Of the run.
        pairs: Steps of each to measure.
    """
    steps = _WARM_UP + pairs + 1
    settings = change_train(settings, steps=steps, score_every=steps, save_every=steps, log_every=10)
    run = folder / "steps"
    run.mkdir()
    with Ranks(settings.train.precision) as ranks, ExitStack() as stack:
        training = build_run(settings, run, ranks, stack)
        work = [share for _, share in itertools.islice(training.steps_with_batches(), _BATCHES)]
        seconds: list[tuple[float, float]] = []
        with patch.object(loop, "Validation", NoValidation):
            loop.train_loop(
                _Alternating(**vars(training), work=work, bare=_bare_step(training), seconds=seconds)
            )
    # The last step also saves.
    kept = seconds[_WARM_UP:-1]
    costs = sorted(100 * (ours / bare - 1) for ours, bare in kept)
    low, middle, high = (costs[len(costs) * quarter // 4] for quarter in (1, 2, 3))
    ours_ms, bare_ms = (1000 * median(times) for times in zip(*kept, strict=True))
    extra_ms = 1000 * median(ours - bare for ours, bare in kept)
    return Table(
        f"One step: {settings.train.global_batch} images, micro-batches of {settings.train.micro_batch}",
        ("", "ms (median)", "compared with the bare loop"),
        [
            ("captionscale train", round(ours_ms, 1), f"{extra_ms:+.2f} ms, {middle:+.2f} %"),
            ("the bare loop", round(bare_ms, 1), ""),
        ],
        [
            f"Steps in turn, {len(kept)} pairs; the middle half of them {low:+.2f} to {high:+.2f} %.",
            "Both: forward, backward, clipping, AdamW, on the same batches in memory. Ours also: keyed",
            "seeds, token counts over all ranks, schedule, a log line every 10 steps, watchdog, preemption.",
        ],
    )


def _bare_step(training: Run) -> Callable[[Share], object]:
    """Return a plain loop's step, with a model and an optimizer of its own."""
    model = copy.deepcopy(training.captioner)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(learning, fused=True)
    settings, device = training.config.train, training.ranks.device
    dtype = DTYPES[settings.precision]

    def step(share: Share) -> None:
        for _, batch in share:
            here = batch.to(device)
            with torch.autocast(device.type, dtype, enabled=settings.precision != "fp32"):
                logits, _ = model(here.images, here.tokens[:, :-1], here.lengths, here.image_index)
            smoothing, rows = (
                settings.label_smoothing,
                packed_index(here.lengths, here.tokens.shape[1] - 1, device),
            )
            targets = here.tokens[:, 1:].flatten()[rows]
            loss = F.cross_entropy(logits.float(), targets, ignore_index=PAD, label_smoothing=smoothing)
            torch.autograd.backward(loss / len(share))
        nn.utils.clip_grad_norm_(learning, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
