"""Each benchmark runs, and its candidates agree where it says so."""

import gc
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import comparison
import pytest
import torch
from experiment import tiny_config

from captionscale.model.captioner import Captioner

BENCHMARKS = {
    "checkpoint": 1,
    "decode": 1,
    "loading": 4,
    "pack": 5,
    "reward": 1,
    "scale": 1,
    "score": 1,
    "training_step": 4,
}
"""Names and numbers of tables."""


@pytest.fixture(autouse=True)
def _open_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """webdataset leaves its last tar open in a reference cycle: collect it here, without the warning."""
    if "loading" not in request.node.name and "pack" not in request.node.name:
        yield
        return
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        yield
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _worker_processes() -> Iterator[None]:
    """They share one import of torch, whether packing or training."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    forkserver.set_forkserver_preload(["captionscale.train.loop"])
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_compares_its_candidates(
    name: str,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, arguments = torch.get_num_threads(), ["--tiny", "--json"]
    monkeypatch.setattr(comparison, "_MATRIX", 256)
    if name in ("training_step", "scale"):
        # Without one they train quickstart's network.
        tiny_config(tmp_path, packed)
        arguments.append(str(tmp_path / "experiment.toml"))
    tables = importlib.import_module(name).main(arguments)
    assert len(tables) == BENCHMARKS[name]
    for table in tables:
        assert all(rate > 0 for result in table.results for rate in result.per_second)
        assert {len(row) for row in table.rows} == {len(table.columns)}
    printed = json.loads(capsys.readouterr().out)
    assert [table["title"] for table in printed["tables"]] == [table.title for table in tables]
    assert torch.get_num_threads() == threads
    if name == "decode":
        # Captions without words would make a comparison of little.
        assert float(re.findall(r"Captions have ([\d.]+) words", tables[0].notes[1])[0]) > 3


@pytest.mark.parametrize(
    ("name", "tolerance"), [("decode", "_TOLERANCE"), ("loading", "_MEAN_STEPS"), ("reward", "_TOLERANCE")]
)
def test_candidates_that_differ_by_more_than_the_tolerance_end_a_benchmark(
    name: str, tolerance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    monkeypatch.setattr(module, tolerance, -1.0)
    with pytest.raises(SystemExit, match="differ"):
        module.main(["--tiny"])


def test_a_training_step_with_other_gradients_ends_its_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("training_step")
    encode = Captioner.encode
    monkeypatch.setattr(Captioner, "encode", lambda self, images: 1.01 * encode(self, images))
    options = module.argparse.Namespace(
        images=4, words=30, length=7, captions=2, encoder="resnet18", side=32, dtype=torch.float32, rounds=1
    )
    with pytest.raises(module.UserError, match="loss or gradients of the two candidates differ"):
        module._whole_steps(options)


def test_packing_needs_images(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no \.jpg files; expected a folder of images"):
        importlib.import_module("pack").main(["--tiny", "--images", str(tmp_path)])


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    # In a process of its own, without the tests' checks of types: its model is only the parts of a run.
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--out", str(tmp_path), "--tiny"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert set(rows) == {*importlib.import_module("gpu").SECTIONS, "seconds"}
    assert [row for section in rows.values() for row in section if row.get("ok") is False] == []
    assert "| micro_batch | step_ms |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.glob("*.gz")] == ["trace-2.json.gz"]


def test_a_check_beyond_its_limit_is_reported(tmp_path: Path) -> None:
    report = importlib.import_module("gpu_model").Report(tmp_path)
    report.check("captions", "differ", 2, 1)
    report.check("captions", "nan", float("nan"), 1)
    assert [row["ok"] for row in report.failed_checks()] == [False, False]
