"""A disk that is full while a run writes curves: a warning, and neither the run nor a curve is lost."""

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from experiment import logged_losses, tiny_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captionscale.errors import UserError
from captionscale.train.log_writer import LogWriter
from captionscale.train.loop import train
from captionscale.train.tensorboard_writer import EventWriter


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: a write is torn there, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def curve(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_points_that_a_full_disk_did_not_take_come_later(tmp_path: Path, capsys) -> None:
    events = EventWriter(tmp_path, 1)
    events.write(1, {"loss": 1.0})
    [path] = tmp_path.iterdir()
    with room_for(path.stat().st_size + 10):
        events.write(2, {"loss": 2.0})
        events.write(3, {"loss": 3.0})
        assert curve(tmp_path) == [(1, 1.0)]
    events.write(4, {"loss": 4.0})
    events.close()
    assert curve(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: {path}: cannot be written (File too large); points are missing in TensorBoard until"
    )


def test_a_disk_that_stays_full_is_told_at_the_end(tmp_path: Path, capsys, monkeypatch) -> None:
    events = EventWriter(tmp_path, 1)
    monkeypatch.setattr(events, "_path", Path("/dev/full"))
    events.write(1, {"loss": 1.0})
    events.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "/dev/full: cannot be written (No space left on device)" in said[0]
    assert said[1] == "warning: /dev/full: the last points are missing; log.jsonl has all"


def test_a_log_that_cannot_be_written_ends_the_run_and_is_named(tmp_path: Path) -> None:
    log = LogWriter(tmp_path, 0, 0)
    log.write(1, loss=1.0)
    with (
        room_for(1),
        pytest.raises(UserError, match=r"log.jsonl: cannot be written \(File too large\), expected"),
    ):
        log.write(2, loss=2.0)
    log.close()


def test_a_run_that_cannot_write_curves_trains_and_logs_as_any_other(
    packed: Path, tmp_path: Path, capsys
) -> None:
    settings = tiny_config(tmp_path, packed, "train.epochs=1")
    train(settings, tmp_path / "alone")
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("no folder", encoding="utf-8")
    capsys.readouterr()
    train(settings, run)
    assert logged_losses(run) == logged_losses(tmp_path / "alone")
    said = capsys.readouterr().err
    assert said.count("points are missing in TensorBoard") == 1
    assert "Traceback" not in said
    assert not [thread for thread in threading.enumerate() if "writer" in thread.name.lower()]
