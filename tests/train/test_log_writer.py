import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captionscale.train.log_writer import LOG_FILE, LogWriter


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_each_line_is_what_was_written(tmp_path: Path) -> None:
    log = LogWriter(tmp_path, 0, 0)
    log.write(1, loss=2.5, lr=1e-3)
    log.write(2, scores={"CIDEr-D": 0.5, "BLEU-4": 0.25}, note="café")
    log.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 2.5, "lr": 1e-3},
        {"step": 2, "scores": {"CIDEr-D": 0.5, "BLEU-4": 0.25}, "note": "café"},
    ]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = LogWriter(tmp_path, 0, 0)
    log.write(1, loss=2.5)
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5}]
    log.close()


def test_numbers_become_curves_and_texts_do_not(tmp_path: Path) -> None:
    log = LogWriter(tmp_path, 0, 0)
    for step in (1, 2, 3):
        log.write(step, loss=0.5 * step, scores={"CIDEr-D": 0.25 * step}, note="word")
    log.close()
    assert curves(tmp_path) == {
        "loss": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "scores/CIDEr-D": [(1, 0.25), (2, 0.5), (3, 0.75)],
    }


def test_a_resumed_run_removes_lines_of_steps_that_it_repeats(tmp_path: Path) -> None:
    first = LogWriter(tmp_path, 0, 0)
    for step in range(1, 8):
        first.write(step, loss=float(step))
    first.close()
    # TensorBoard reads its files in the order of their seconds.
    time.sleep(1)
    resumed = LogWriter(tmp_path, 4, 0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    resumed.write(5, loss=50.0)
    resumed.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 50),
    ]
    assert curves(tmp_path)["loss"] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]


def test_pending_scores_are_logged_again(tmp_path: Path) -> None:
    first = LogWriter(tmp_path, 0, 0)
    for step in (2, 4):
        first.write(step, loss=1.0)
        first.write(step, scores={"CIDEr-D": 0.5})
    first.close()
    LogWriter(tmp_path, 4, 2).close()
    assert [(line["step"], "scores" in line) for line in lines(tmp_path)] == [
        (2, False),
        (2, True),
        (4, False),
    ]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"st', "3", "\0\0\0", '{"loss": 1.0}', ""])
def test_a_resumed_run_removes_a_torn_last_line(tmp_path: Path, torn: str) -> None:
    whole = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    (tmp_path / LOG_FILE).write_text(whole + torn, encoding="utf-8")
    LogWriter(tmp_path, 9, 0).close()
    assert (tmp_path / LOG_FILE).read_text(encoding="utf-8") == whole


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    LogWriter(tmp_path, 0, 0).close()
    assert (tmp_path / LOG_FILE).read_text(encoding="utf-8") == ""
