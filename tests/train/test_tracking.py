import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
from experiment import logged_losses, tiny_config
from mlflow.tracking import MlflowClient

from captionscale import toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.train import tracking
from captionscale.train.log_writer import LogWriter
from captionscale.train.loop import train
from captionscale.train.tracking import TRACKERS_FILE, Trackers, check_trackers_installed

FAILING = """
import mlflow
logged = mlflow.log_metrics
def log(points, step):
    if step in (2, 3):
        raise ConnectionError("no route")
    logged(points, step=step)
mlflow.log_metrics = log
"""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Both services without any network: files of this machine."""
    store = f"file:{tmp_path}/mlruns"
    # Also on a busy machine.
    monkeypatch.setattr(tracking, "_CLOSE_S", 300.0)
    for name, value in {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": store,
        # Without it MLflow 3 refuses files.
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        monkeypatch.setenv(name, value)
    return MlflowClient(store)


def settings(*names: str) -> Config:
    return toml.load("quickstart", [f"train.trackers={json.dumps(names)}"])


def log_to_trackers(run: Path, config: Config, *points: tuple[int, dict[str, Any]]) -> dict[str, str]:
    """Log points while trackers are open, and return the trackers' ids of the run."""
    with closing(LogWriter(run, 9, 9)) as log, closing(Trackers(run, config)):
        for step, values in points:
            log.write(step, **values)
    ids: dict[str, str] = (
        json.loads((run / TRACKERS_FILE).read_text()) if (run / TRACKERS_FILE).exists() else {}
    )
    return ids


def curve(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_mlflow_gets_settings_metrics_and_late_scores_and_a_resumed_run_continues(services, tmp_path) -> None:
    config = settings("mlflow")
    late = {"scores": {"CIDEr-D": 0.25}}
    first = log_to_trackers(tmp_path, config, (1, {"loss": 2.0}), (2, {"loss": 1.5}), (1, late))
    later = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 9})})
    assert log_to_trackers(tmp_path, later, (3, {"loss": 1.0})) == first
    run_id = first["mlflow"]
    assert curve(services, run_id, "loss") == [(1, 2.0), (2, 1.5), (3, 1.0)]
    assert curve(services, run_id, "scores/CIDEr-D") == [(1, 0.25)]
    facts = services.get_run(run_id)
    assert facts.data.params["train.lr"] == str(config.train.lr)
    assert facts.info.run_name == tmp_path.name
    assert mlflow.active_run() is None


@pytest.mark.usefixtures("services")
def test_wandb_offline_keeps_all_for_wandb_sync_and_a_resumed_run_keeps_its_id(tmp_path) -> None:
    config = settings("wandb")
    points = (1, {"loss": 2.0}), (2, {"loss": 1.5}), (1, {"scores": {"CIDEr-D": 0.25}})
    first = log_to_trackers(tmp_path, config, *points)
    time.sleep(1)  # Its folders are called after the second.
    assert log_to_trackers(tmp_path, config, (3, {"loss": 1.0})) == first
    kept = sorted((tmp_path / "wandb").glob(f"offline-run-*-{first['wandb']}/*.wandb"))
    assert len(kept) == 2
    # Records of its own format, which hold strings unchanged.
    written = kept[0].read_bytes()
    for text in (b"train.global_batch", b"scores/CIDEr-D", b"step"):
        assert text in written


def test_an_unreachable_server_is_a_warning(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert log_to_trackers(tmp_path, settings("mlflow"), (1, {"loss": 2.0})) == {}
    assert "warning: mlflow cannot be reached" in capsys.readouterr().err


@pytest.mark.usefixtures("started")
def test_a_failing_tracker_is_one_warning_and_gets_the_other_lines(
    services, tmp_path, monkeypatch, capsys
) -> None:
    # The process of the trackers imports it first.
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(FAILING, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(patch))
    ids = log_to_trackers(
        tmp_path, settings("mlflow"), *((step, {"loss": float(step)}) for step in range(1, 5))
    )
    assert curve(services, ids["mlflow"], "loss") == [(1, 1.0), (4, 4.0)]
    stderr = capsys.readouterr().err
    assert stderr.count("no route") == 1
    assert "mlflow: 2 of 4 lines are missing" in stderr


def test_a_missing_package_is_refused_by_the_name_of_its_extra(monkeypatch) -> None:
    check_trackers_installed(("wandb", "mlflow"))
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"'wandb' is not installed, .* pip install 'captionscale\[track\]'"):
        check_trackers_installed(("wandb",))


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.trackers"):
        settings("comet")


def test_a_run_is_the_same_with_and_without_trackers(services, packed, tmp_path) -> None:
    config = tiny_config(tmp_path, packed, 'train.trackers=["mlflow"]', "train.epochs=1")
    train(config, tmp_path / "tracked")
    alone = config.model_copy(update={"train": config.train.model_copy(update={"trackers": ()})})
    train(alone, tmp_path / "alone")
    assert logged_losses(tmp_path / "tracked") == logged_losses(tmp_path / "alone")
    run_id = json.loads((tmp_path / "tracked" / TRACKERS_FILE).read_text())["mlflow"]
    assert curve(services, run_id, "loss") == logged_losses(tmp_path / "tracked")
    assert [step for step, _ in curve(services, run_id, "scores/CIDEr-D")] == [3]
