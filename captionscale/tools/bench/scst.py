"""`captionscale bench scst`: what a step of self-critical training spends its time on."""

import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.tools.bench.race import Sheet
from captionscale.train.checkpoints import open_checkpoint
from captionscale.train.losses import cross_entropy
from captionscale.train.setup import Run, build_run

_PARTS = ("sampling", "reward", "update")


def bench(run: Path, *, images: int, rounds: int) -> list[Sheet]:
    """Measure steps of self-critical training that begins with a run's weights, on its train images.

    Args:
        run: The --out of captionscale train.
        images: In a step; each has `scst.samples_per_image` captions.
        rounds: Steps that are measured.

    Raises:
        UserError: No run, or its shards are gone.
    """
    with Ranks(open_checkpoint(run).config().train.precision) as ranks, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="captionscale-bench-")))
        settings = _settings(run, images)
        job = build_run(settings, folder, ranks, stack)
        batch = next(job.steps_with_batches())[1][0][1].to(ranks.device)
        steps = [_step(job, batch, step) for step in range(rounds + 1)][1:]
    whole = [sum(step.values()) for step in steps]
    rows: list[list[str | int | float]] = []
    for part in _PARTS:
        shares = [100 * step[part] / total for step, total in zip(steps, whole, strict=True)]
        milliseconds = 1000 * median(step[part] for step in steps)
        rows.append(
            [part, round(milliseconds, 1), f"{median(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})"]
        )
    samples = settings.scst.samples_per_image
    sheet = Sheet(
        f"A step of {images:,} images with {samples} samples each",
        ("part", "ms", "% of the step"),
        list(rows),
    )
    sheet.notes.append(
        "Parts are measured one after the other; in a step, a GPU works while the reward is computed."
    )
    return [sheet]


def _settings(run: Path, images: int) -> Config:
    """Return a run's settings, changed to go on with self-critical training in batches of so many images."""
    config = open_checkpoint(run).config()
    tree = config.model_dump()
    tree["train"] |= {
        "objective": "scst",
        "init_from": run,
        "lr": 5e-5,
        "global_batch": images,
        "micro_batch": images,
        "unfreeze_at": 0,
    }
    return Config.model_validate(tree)


def _step(job: Run, batch: Batch, step: int) -> dict[str, float]:
    """Take a step as the loop does, but one part after the other; return the seconds of each."""
    ranks, times = job.ranks, [time.perf_counter()]

    def lap() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    (target,) = job.objective.targets([(0, batch)], step, ranks)
    lap()
    words = target.num_tokens.double()
    weights = target.weights(words, job.objective.cross_entropy_weight)
    lap()
    following, rows = target.tokens[:, 1:], target.rows
    logits, _ = job.engine(target.images, target.input_tokens, target.image_index, 0.0, rows)
    job.engine.backward(cross_entropy(logits, following, 0.0, rows) @ weights)
    job.engine.step()
    lap()
    return dict(zip(_PARTS, (after - before for before, after in pairwise(times)), strict=True))
