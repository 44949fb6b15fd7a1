"""The experiment of a benchmark: the user's config, or quickstart's model on synthetic images."""

import argparse
from pathlib import Path
from typing import Any

from captionscale import toml
from captionscale.config import Config
from captionscale.data import packing, synthetic
from captionscale.data.sources import coco
from captionscale.progress import say

COCO_WORDS = 9490
"""Words that occur five times in the captions of COCO's train images, in Karpathy's split."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and --set, which `load_config` reads."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a path, or a name in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="changes")


def load_config(options: argparse.Namespace, folder: Path, train: int = 320) -> Config:
    """Return the experiment that the command line names, or quickstart's on some synthetic images.

    Args:
        options: Of a parser with `add_config`.
        folder: Where to write the images.
        train: Number of train images.
    """
    if options.config:
        return toml.load(options.config, options.changes)
    say("note: quickstart's model on synthetic images; name a config for yours")
    shards = write_shards(folder, {"train": train, "val": 8}, size=96)
    return toml.load("quickstart", [f"data.shards={shards}", "train.micro_batch=16"])


def write_shards(folder: Path, counts: dict[str, int], size: int) -> Path:
    """Write shards of synthetic images; return their folder.

    Args:
        folder: Where to write.
        counts: Images of each split.
        size: Of an image, in pixels.
    """
    synthetic.write_coco(folder / "coco", counts=counts, size=size)
    for split in counts:
        captions = folder / "coco" / "annotations" / f"captions_{split}2017.json"
        records = coco.read_official(folder / "coco" / f"{split}2017", captions, split)
        packing.pack(records, folder / "shards", sources=[captions], options=packing.PackOptions())
    return folder / "shards"


def change_train(config: Config, **changes: Any) -> Config:
    """Return a config with other values in its section `train`."""
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
