"""What the sections of gpu.py share: their report, models without data, and one training step."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from captionscale import toml
from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.distributed.engine import Engine
from captionscale.distributed.ranks import Ranks
from captionscale.model.captioner import Captioner
from captionscale.train.ema import ModelEMA
from captionscale.train.objective import objective_class
from captionscale.train.optimizer import make_optimizer, unfreeze
from captionscale.train.preemption import PreemptionFlag
from captionscale.train.step import training_step
from captionscale.vocab import END, START

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PRECISION = "bf16" if GPU else "fp32"
TINY_MODEL = (
    "model.encoder.name=resnet18",
    "model.decoder.embed_size=16",
    "model.decoder.hidden_size=16",
    "model.decoder.attention_size=16",
    "model.decoder.region_size=16",
)


class Report:
    """Measurements by section, printed as they come and written as JSON and Markdown."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def add(self, section: str, /, **values: Any) -> None:
        """Add a row to a section."""
        self.rows[section].append(values)
        print(
            f"{section}: " + "  ".join(f"{key} {_shown(value)}" for key, value in values.items()), flush=True
        )

    def check(self, section: str, what: str, found: float, limit: float) -> None:
        """Add a row that states whether a value is within its limit."""
        self.add(section, check=what, found=float(found), limit=limit, ok=bool(found <= limit))

    def failed_checks(self) -> list[dict[str, Any]]:
        """Return the rows of checks beyond their limits."""
        return [row for rows in self.rows.values() for row in rows if row.get("ok") is False]

    def write(self) -> None:
        """Write gpu.json and gpu.md."""
        (self.folder / "gpu.json").write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        lines = []
        for section, rows in self.rows.items():
            lines += [f"## {section}", ""]
            # Rows with the same columns share a table.
            tables: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
            for row in rows:
                tables[tuple(row)].append(row)
            for columns, some in tables.items():
                lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
                lines += [f"| {' | '.join(map(_shown, row.values()))} |" for row in some]
                lines.append("")
        (self.folder / "gpu.md").write_text("\n".join(lines), encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if GPU:
        torch.cuda.synchronize()


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Let convolutions compute in true fp32, in a fixed order."""
    saved = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = saved


def load_config(tiny: bool, *overrides: str) -> Config:
    """Return configs/attention.toml with random weights and overrides, or a tiny model."""
    small = (*TINY_MODEL, "data.image_size=32") if tiny else ()
    return toml.load("attention", ["model.encoder.weights=none", *small, *overrides])


def build_model(config: Config, words: int, ranks: Ranks) -> Any:
    """Return the parts of a `Run` that a training step uses, without data."""
    torch.manual_seed(0)
    captioner = Captioner(config.model, words).to(ranks.device).train()
    unfreeze(captioner, config.train, 10**9)
    engine = Engine(ranks, captioner, make_optimizer(captioner, config.train), config.train.clip_norm)
    no_data: Any = None
    return SimpleNamespace(
        config=config,
        ranks=ranks,
        engine=engine,
        captioner=captioner,
        ema=ModelEMA(captioner, config.train.ema_decay) if config.train.ema_decay else None,
        steps=10**6,
        objective=objective_class("cross-entropy")(config, captioner, no_data, no_data),
    )


def random_batch(images: int, words: int, size: int | tuple[int, int], seed: int = 0) -> Batch:
    """Return a micro-batch of noise, in pinned memory, with five captions per image as long as COCO's.

    Args:
        images: Number of images.
        words: Size of the vocabulary.
        size: Of images in pixels, or (regions, feature size) of features.
        seed: Of the noise.
    """
    random = np.random.default_rng(seed)
    lengths = np.clip(np.round(random.normal(10.5, 2.4, images * 5)), 5, 20).astype(int)
    tokens = np.zeros((len(lengths), lengths.max() + 2), dtype=np.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length + 2] = [START, *random.integers(END + 2, words, length), END]
    if isinstance(size, int):
        pixels = torch.from_numpy(random.integers(0, 256, (images, size, size, 3), dtype=np.uint8))
        data = (pixels.pin_memory() if GPU else pixels).permute(0, 3, 1, 2)
    else:
        data = torch.from_numpy(random.random((images, *size), dtype=np.float32).astype(np.float16))
    image_index = torch.from_numpy(np.repeat(np.arange(images), 5))
    return Batch(data, torch.from_numpy(tokens), image_index, list(range(images)))


def train_step(model: Any, step: int, batches: list[Batch], flag: PreemptionFlag) -> None:
    """Take the training loop's own step."""
    flag.is_set()
    training_step(
        model.engine, model.objective, list(enumerate(batches)), model.config, step, model.steps, flag=flag
    )
    if model.ema:
        model.ema.update(step)
