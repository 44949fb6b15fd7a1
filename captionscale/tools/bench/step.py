"""`captionscale bench step`: a step beside the tutorial's, the machinery around it, the start of a run."""

import copy
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from captionscale import subprocesses, toml
from captionscale.config import Config
from captionscale.data import packing, synthetic
from captionscale.data.loader import Batch
from captionscale.data.sources import coco
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.escape import for_shell
from captionscale.progress import progress, say
from captionscale.tools.bench import tutorial
from captionscale.tools.bench.race import Heat, Sheet
from captionscale.train import run_folder
from captionscale.train.log_reader import read_metric
from captionscale.train.loop import train_loop
from captionscale.train.setup import Run, build_run
from captionscale.vocab import PAD

Share = list[tuple[int, Batch]]

_COUNTS = {"train": 320, "val": 8}
_WARM_UP, _STEPS_OF_A_ROUND, _BATCHES = 5, 20, 4
_LOOK_S = 0.01
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Alternating(Run):
    """A run that takes its own step and a bare one in turn, on the same batches, from memory."""

    work: list[Share]
    bare: Callable[[Share], object]
    seconds: list[tuple[float, float]]
    """Of each step, ours and bare."""

    def steps_with_batches(self) -> Iterator[tuple[int, Share]]:
        """Yield the steps; what passes until the next one is asked for is what the loop makes of one."""
        for step in range(self.steps):
            share = self.work[step % len(self.work)]
            # The one that goes first finds other things in the caches: each does so in every second step.
            first = self._time_bare(share) if step % 2 else 0.0
            start = time.perf_counter()
            yield step, share
            ours = time.perf_counter() - start
            self.seconds.append((ours, first or self._time_bare(share)))

    def _time_bare(self, share: Share) -> float:
        start = time.perf_counter()
        self.bare(share)
        return time.perf_counter() - start


def bench(config: Config | None, *, images: int, rounds: int) -> list[Heat | Sheet]:
    """Measure a step beside the tutorial's form of it, the machinery around one, and the start of a run.

    Args:
        config: The experiment of the last two, whose precision is that of the first; None: that of
            quickstart, on drawn pictures, and fp32.
        images: Of the first.
        rounds: Of each way, of twenty steps each, and of starts.

    Raises:
        UserError: As `train`.
    """
    with tempfile.TemporaryDirectory(prefix="captionscale-bench-") as name:
        settings = config or drawn(Path(name))
        precision = _DTYPES[config.train.precision] if config else torch.float32
        heats = tutorial.bench(rounds=rounds, sizes=tutorial.Sizes(images=images, precision=precision))
        return [*heats, _steps(settings, Path(name), rounds), _starts(settings, Path(name), rounds)]


def drawn(folder: Path) -> Config:
    """Return quickstart's experiment on a few pictures of its kind."""
    say("note: quickstart's model, on drawn pictures; name a config for yours")
    synthetic.write_coco(folder / "coco", counts=_COUNTS, size=96)
    for split in _COUNTS:
        captions = folder / "coco" / "annotations" / f"captions_{split}2017.json"
        records = coco.read_official(folder / "coco" / f"{split}2017", captions, split)
        packing.pack(records, folder / "shards", sources=[captions], options=packing.PackOptions())
    return toml.load("quickstart", [f"data.shards={folder / 'shards'}", "train.micro_batch=16"])


def _steps(config: Config, folder: Path, rounds: int) -> Sheet:
    steps = _WARM_UP + rounds * _STEPS_OF_A_ROUND + 1
    settings = _changed(config, steps=steps, score_every=steps, save_every=steps, log_every=10)
    run = folder / "steps"
    run.mkdir()
    with Ranks(settings.train.precision) as ranks, ExitStack() as stack:
        job = build_run(settings, run, ranks, stack)
        work = [share for _, share in itertools.islice(job.steps_with_batches(), _BATCHES)]
        seconds: list[tuple[float, float]] = []
        train_loop(_Alternating(**vars(job), work=work, bare=_bare(job), seconds=seconds))
    # The last step also scores and saves.
    kept = seconds[_WARM_UP:-1]
    costs = sorted(100 * (ours / bare - 1) for ours, bare in kept)
    low, middle, high = (costs[len(costs) * quarter // 4] for quarter in (1, 2, 3))
    ours_ms, bare_ms = (1000 * median(times) for times in zip(*kept, strict=True))
    extra_ms = 1000 * median(ours - bare for ours, bare in kept)
    return Sheet(
        f"One step: {settings.train.global_batch} images, micro-batches of {settings.train.micro_batch}",
        ("", "ms (median)", "beside the bare loop"),
        [
            ("captionscale train", round(ours_ms, 1), f"{extra_ms:+.2f} ms, {middle:+.2f} %"),
            ("the bare loop", round(bare_ms, 1), ""),
        ],
        [
            f"Steps in turn, {len(kept)} pairs; the middle half of them {low:+.2f} to {high:+.2f} %.",
            "Both: forward, backward, clipping, AdamW, on the same batches in memory. Ours besides: keyed",
            "seeds, words of all ranks, schedule, a log line every 10 steps, pace, watchdog, preemption.",
        ],
    )


def _bare(job: Run) -> Callable[[Share], object]:
    """Return what a plain loop does of a step, with a model and an optimiser of its own."""
    model = copy.deepcopy(job.captioner)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(learning, fused=True)
    settings = job.config.train
    dtype = _DTYPES[settings.precision]

    def step(share: Share) -> None:
        for _, batch in share:
            here = batch.to(job.ranks.device)
            with torch.autocast(job.ranks.device.type, dtype, enabled=settings.precision != "fp32"):
                logits, _ = model(here.images, here.tokens[:, :-1], here.image_index)
            targets = here.tokens[:, 1:].flatten()
            loss = F.cross_entropy(
                logits.float().flatten(0, 1),
                targets,
                ignore_index=PAD,
                label_smoothing=settings.label_smoothing,
            )
            torch.autograd.backward(loss / len(share))
        nn.utils.clip_grad_norm_(learning, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if job.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _starts(config: Config, folder: Path, rounds: int) -> Sheet:
    """Start runs by the command line, as a user does, and wait for the first line of their logs."""
    settings = _changed(config, steps=10**6, score_every=10**6, save_every=2, log_every=1)
    path = folder / "starts.toml"
    path.write_text(toml.dumps(settings), encoding="utf-8")
    fresh: list[float] = []
    resumed: list[float] = []
    with progress("starts", 2 * rounds, transient=True) as bar:
        for number in range(rounds):
            run = folder / f"start-{number}"
            for times in (fresh, resumed):
                times.append(_start(path, run))
                bar.advance()
    rows = [
        (name, round(median(times), 1), f"{min(times):.1f} to {max(times):.1f}")
        for name, times in (("fresh", fresh), ("resumed", resumed))
    ]
    notes = ["A resumed run proves its checkpoint's checksums, and reads weights and AdamW's memory."]
    return Sheet("From the command to the end of the first step", ("", "s (median)", "s"), [*rows], notes)


def _start(path: Path, run: Path) -> float:
    """Return the seconds that a run takes to log a step of its own; end it when it has saved one."""
    saved = max(run_folder.checkpoint_steps(run), default=0)
    began = time.time()
    command = [sys.executable, "-m", "captionscale", "train", str(path), "--out", str(run)]
    with subprocesses.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and max(read_metric(run, "loss", began), default=0) <= saved:
            time.sleep(_LOOK_S)
        seconds = time.time() - began
        while process.poll() is None and max(run_folder.checkpoint_steps(run), default=0) <= saved:
            time.sleep(_LOOK_S)
        process.kill()
        said = process.stderr.read() if process.stderr else ""
    if process.returncode != -signal.SIGKILL:
        raise UserError(f"{for_shell(*command)} ended with exit code {process.returncode}: {said.strip()}")
    return seconds


def _changed(config: Config, **changes: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
