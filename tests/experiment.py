"""A tiny experiment that trains in seconds, for tests of what a run does."""

import json
import os
import pickle
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from captionscale import config, toml
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.model.captioner import Captioner
from captionscale.train.checkpoint_writer import CheckpointWriter
from captionscale.train.run_folder import checkpoint_steps
from captionscale.train.state import TrainState
from captionscale.vocab import build

TINY_OVERRIDES = (
    "data.image_size=32",
    "data.min_count=1",
    "data.max_words=8",
    "data.color_jitter=0.1",
    "data.workers=1",
    'model.encoder={name="tiny_encoder:TinyEncoder", weights="none", trainable=["second"]}',
    "model.decoder.embed_size=16",
    "model.decoder.hidden_size=16",
    "model.decoder.attention_size=16",
    "model.decoder.dropout=0.5",
    "train.epochs=2",
    "train.global_batch=16",
    "train.micro_batch=4",
    "train.precision=fp32",
    "train.log_every=1",
)

_WORK = "import pickle, sys; work, arguments = pickle.loads(bytes.fromhex(sys.argv[1])); work(*arguments)"


def tiny_config(folder: Path, packed: Path, *changes: str) -> config.Config:
    """Write a tiny experiment's file, `experiment.toml`, and return its settings."""
    path = folder / "experiment.toml"
    path.write_text(f'[data]\nshards = "{packed}"\n', encoding="utf-8")
    settings = toml.load(path, [*TINY_OVERRIDES, *changes])
    path.write_text(toml.dumps(settings), encoding="utf-8")
    return settings


def peaked_run(folder: Path, packed: Path, *changes: str) -> Path:
    """Write an untrained run with one checkpoint that distinguishes images and has sharp probabilities."""
    import torch

    settings = tiny_config(folder, packed, "data.image_size=64", *changes)
    split = Split(packed, "train")
    captions = split.references().values()
    vocabulary = build((caption for each in captions for caption in each), 1, None)
    torch.manual_seed(0)
    captioner = Captioner(settings.model, len(vocabulary)).eval()
    [batch] = Loader(split, vocabulary, settings.data).prefetch([(np.arange(16), None)])
    with torch.no_grad():
        for parameter in captioner.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        # The features of an untrained encoder are nearly the same for all images.
        features = captioner.encode(batch.images).flatten(0, 1)
        regions = captioner.decoder.region_projection
        regions.weight /= features.std() * features.shape[1] ** 0.5 / 4
        regions.bias.copy_(-(regions.weight @ features.mean(0)))
    run = folder / "run"
    CheckpointWriter(run, settings, vocabulary, {}).write(TrainState(step=1), captioner.state_dict(), {})
    return run


def start_training(
    ranks: int, settings: config.Config, run: Path, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """Start a run's processes."""
    return spawn_ranks(ranks, _train, toml.dumps(settings), run, **environment)


def spawn_ranks(
    ranks: int, work: Callable[..., None], *arguments: Any, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """Start processes that meet over gloo, each of which works with these arguments."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", _WORK, pickle.dumps((work, arguments)).hex()]
    return [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def join_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all processes, and expect them to have done well."""
    try:
        for process in processes:
            process.wait(600)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes)


def _train(toml: str, run: Path) -> None:
    from captionscale.train.loop import train

    train(config.Config.model_validate(tomllib.loads(toml)), run, sample_log=True)


def load_weights(run: Path, step: int | None = None) -> dict[str, Tensor]:
    """Return the weights of a run's checkpoint; the newest, if no step is named."""
    step = step or checkpoint_steps(run)[-1]
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def max_abs_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return by how much two sets of weights differ, over all numbers in them."""
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def logged_losses(run: Path) -> list[tuple[int, Any]]:
    """Return the steps and losses of a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
