"""Checks over ranks before the first step."""

import os
import tomllib
from pathlib import Path

from experiment import spawn_ranks, tiny_config

from captionscale import config
from captionscale.data.packing import PackOptions, pack
from captionscale.data.sources import coco
from captionscale.errors import UserError
from captionscale.train.loop import train


def _train(folder: Path) -> None:
    file = folder / os.environ["RANK"] / "experiment.toml"
    try:
        train(config.Config.model_validate(tomllib.loads(file.read_text())), folder / "run")
    except UserError as error:
        (folder / "error").write_text(str(error))
        raise SystemExit(1) from None


def test_ranks_that_find_different_shards_are_refused(
    synthetic_coco: Path, packed: Path, tmp_path: Path
) -> None:
    # As on two machines with different copies.
    other = tmp_path / "other"
    for split in ("train", "val"):
        captions = synthetic_coco / "annotations" / f"captions_{split}2017.json"
        records = coco.read_official(synthetic_coco / f"{split}2017", captions, split)
        pack(records, other, sources=[captions], options=PackOptions(images_per_shard=8))
    for rank, shards in enumerate((packed, other)):
        (tmp_path / str(rank)).mkdir()
        tiny_config(tmp_path / str(rank), shards, "train.steps=1")
    processes = spawn_ranks(2, _train, tmp_path)
    for process in processes:
        process.wait(600)
    assert [process.returncode for process in processes] == [1, 1]
    assert "rank 1 finds other shards there than rank 0" in (tmp_path / "error").read_text()
