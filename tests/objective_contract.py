"""What every objective must hold to; a test calls `check` with its class."""

from pathlib import Path

import numpy as np
import torch
from experiment import tiny_config

from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.data.shards import Split
from captionscale.distributed.ranks import Ranks
from captionscale.model.captioner import Captioner
from captionscale.train.objective import Objective
from captionscale.train.step import micro_batch_loss
from captionscale.vocab import START, build


def check(kind: type[Objective], config: Config, packed: Path) -> None:
    """Check targets, loss and figures of an objective on two micro-batches."""
    split = Split(packed, "train")
    vocabulary = build((text for item in range(len(split)) for text in split.captions(item)), 1, None)
    torch.manual_seed(0)
    captioner = Captioner(config.model, len(vocabulary)).train()
    objective = kind(config, captioner, split, vocabulary)
    batches = []
    for number in range(2):
        items = range(3 * number, 3 * number + 3)
        tokens = [
            (row, vocabulary.encode(text, config.data.max_words))
            for row, item in enumerate(items)
            for text in split.captions(item)
        ]
        width = max(len(each) for _, each in tokens) + 1
        padded = np.zeros((len(tokens), width), dtype=np.int64)
        for line, (_, each) in zip(padded, tokens, strict=True):
            line[: len(each)] = each
        features = torch.randn(3, 4, captioner.encoder.feature_size).half()
        image_index = torch.tensor([row for row, _ in tokens])
        image_ids = [int(split.index["image_id"][item]) for item in items]
        batches.append((number, Batch(features, torch.from_numpy(padded), image_index, image_ids)))
    with Ranks() as ranks:
        (alone,) = objective.targets(batches[1:], 7, ranks)
        targets = objective.targets(batches, 7, ranks)
        assert len(targets) == len(batches)
        # Targets depend on the step and the micro-batch alone.
        assert torch.equal(alone.tokens, targets[1].tokens)
        counts = torch.stack([target.num_tokens for target in targets]).sum(0).double()
        assert counts.sum() > 0
        for target in targets:
            assert (target.tokens[:, 0] == START).all()
            assert 0 <= target.image_index.min() <= target.image_index.max() < 3
            loss = micro_batch_loss(
                captioner,
                target,
                counts,
                label_smoothing=objective.label_smoothing,
                cross_entropy_weight=objective.cross_entropy_weight,
            )
            assert loss.isfinite()
            loss.backward()
        assert any(each.grad is not None and each.grad.abs().sum() > 0 for each in captioner.parameters())
        figures = objective.figures(ranks)
    assert all(np.isfinite(value) for value in figures.values())
    assert set(objective.progress_figures) <= set(figures)


def config_of(name: str, folder: Path, packed: Path) -> Config:
    """Return a tiny experiment with a frozen encoder and an objective."""
    changes = ("model.encoder.trainable=none", "train.lr=1e-4", "train.init_from=source")
    return tiny_config(folder, packed, f"train.objective={name}", *changes)
