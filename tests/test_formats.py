"""The page of formats knows all that is written."""

import dataclasses
import json
import re
from pathlib import Path

import msgspec
import pytest
from experiment import tiny_config

from captionscale.data import manifest, shard_writer
from captionscale.score import receipt
from captionscale.tools.doctor import report
from captionscale.tools.export import bundle
from captionscale.train import checkpoint, watchdog
from captionscale.train.loop import train

PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
NAMED = {word for code in re.findall(r"`([^`]+)`", PAGE) for word in re.findall(r"[\w.-]+", code)}
"""All words that the page has as code."""


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    changes = ("train.steps=2", "train.ema_decay=0.9", "data.image_size=32")
    train(tiny_config(folder, packed, *changes), folder / "run", sample_log=True)
    return folder / "run"


def test_it_names_each_file_of_a_run(run) -> None:
    [saved] = (run / "checkpoints").iterdir()
    assert {path.name for path in (*run.iterdir(), *saved.iterdir())} <= NAMED


def test_it_names_each_key_of_a_run(run) -> None:
    [state] = run.glob("checkpoints/*/state.json")
    lines = [json.loads(line) for path in run.rglob("*.jsonl") for line in path.read_text().splitlines()]
    keys = {*json.loads(state.read_text()), *(key for line in lines for key in line)}
    assert {"fingerprint", "scores", "image_ids"} <= keys <= NAMED


def test_it_names_what_seldom_is_written() -> None:
    stalled = {field.name for field in dataclasses.fields(watchdog.RankStatus)}
    assert stalled | {field.name for field in msgspec.structs.fields(shard_writer.RejectedImage)} <= NAMED


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("`manifest.json`:", manifest.FORMAT),
        ("`state.json`:", checkpoint.FORMAT),
        ("(#receipt) |", receipt.FORMAT),
        ("(running.md#doctor-will-the-job-work) |", report.FORMAT),
        ("`config.json`:", bundle.FORMAT),
    ],
)
def test_it_has_the_numbers_of_formats(place, number) -> None:
    assert f'{place} `"format": {number}`' in PAGE
