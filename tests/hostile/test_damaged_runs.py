"""A run whose files were damaged or copied resumes and is reported; what is skipped is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from experiment import load_weights, logged_losses, max_abs_difference, tiny_config

from captionscale import files
from captionscale.cli import main
from captionscale.data.feature_cache import FeatureFile, create_all
from captionscale.errors import UserError
from captionscale.tools.export import bundle
from captionscale.train import log_reader, sample_log
from captionscale.train.log_writer import LogWriter
from captionscale.train.run_folder import LOG_FILE, remove_partial_checkpoints

GARBAGE = b"\xff\xfe{" * 10
ODD_LINES = (
    b'"loss"',
    b"5",
    b"[]",
    b'{"loss": 1}',
    b'{"step": true}',
    b'{"step": -1, "loss": 1}',
    b'{"step": 2, "loss": "x"}',
    b'{"step": 2, "scores": {"CIDEr-D": []}}',
    b'{"step": 1' + b"0" * 400 + b', "loss": 1}',
    b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": 2, "loss": 1' + b"0" * 400 + b"}",
    b"[" * 100_000,
    b'{"step": 2, "loss": 1.\xff}',
    b"\0\0\0",
)


@pytest.fixture(scope="module")
def done(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, with checkpoints of steps 3 and 6."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("done") / "run")


@pytest.fixture
def damaged(done: Path, tmp_path: Path) -> Path:
    """A copy that was stopped after step 3, and whose files are not what they were."""
    run = Path(shutil.copytree(done, tmp_path / "run"))
    saved = run / "checkpoints" / "step-00000003"
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    for name in ("step-3", "step-00000003.bak", "step-00000003.backup.tmp", "notes.tmp"):
        shutil.copytree(saved, saved.parent / name)
    for name in ("step-00000005.tmp", "step-00000002.old.tmp"):
        (saved.parent / name).mkdir()
    captions = run / "validation" / "step-00000003.json"
    shutil.copy(captions, captions.with_name("step-00000003 (copy).json"))
    lines = (run / LOG_FILE).read_bytes().splitlines(keepends=True)
    second = bytearray(lines[1])
    second[len(second) // 2] = 0xFF
    (run / LOG_FILE).write_bytes(
        lines[0] + second + b"".join(line + b"\n" for line in ODD_LINES) + b"".join(lines[2:])
    )
    (run / files.LOCK).write_bytes(GARBAGE)
    (run / "scores").mkdir()
    (run / "sample_log").mkdir()
    for place in ("scores/history.jsonl", "stalls.jsonl", "sample_log/attempt-00001.rank-00000.jsonl"):
        (run / place).write_bytes(GARBAGE)
    for path in (run / "tensorboard").iterdir():
        path.write_bytes(GARBAGE)
    return run


def test_a_damaged_run_resumes_as_if_nothing_had_been(
    done: Path, damaged: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(tmp_path, packed)
    main(["train", str(tmp_path / "experiment.toml"), "--out", str(damaged)])
    assert max_abs_difference(load_weights(damaged), load_weights(done)) == 0
    assert logged_losses(damaged) == [pair for pair in logged_losses(done) if pair[0] != 2]
    told = capsys.readouterr().err
    count = len(ODD_LINES) + 1
    assert f"{damaged / LOG_FILE}: skipped {count} damaged lines, the first is line 2; moved to" in told
    assert f"{damaged / 'checkpoints'}: skipped 'notes.tmp' and 3 more, which training did not write" in told
    assert f"{damaged / 'validation'}: skipped 'step-00000003 (copy).json', which" in told
    kept = (damaged / f"{LOG_FILE}.damaged").read_bytes().splitlines()
    assert kept[1:] == [*ODD_LINES]
    names = {path.name for path in (damaged / "checkpoints").iterdir()}
    assert names == {
        *("step-00000003", "step-00000006"),
        *("step-3", "step-00000003.bak", "step-00000003.backup.tmp", "notes.tmp"),
    }


def test_a_damaged_run_is_reported_and_watched(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(damaged), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"skipped {len(ODD_LINES) + 1} damaged lines, the first is line 2" in page
    assert "skipped &#x27;step-00000003 (copy).json&#x27;" in page
    capsys.readouterr()
    main(["watch", str(damaged), "--once"])
    told = capsys.readouterr().out
    assert f"log.jsonl {len(ODD_LINES) + 1}" in told
    assert "\x1b" not in told


def test_a_line_of_the_history_does_not_end_in_a_torn_one(damaged: Path, tmp_path: Path) -> None:
    main(["caption", str(damaged), "--split", "val", "--out", str(tmp_path / "c.json"), "--beam", "1"])
    torn, line = (damaged / "scores" / "history.jsonl").read_bytes().splitlines()
    assert torn == GARBAGE
    assert json.loads(line)["split"] == "val"


@pytest.mark.parametrize("line", ODD_LINES)
def test_an_odd_line_is_passed_over_by_each_reader_of_the_log(tmp_path: Path, line: bytes) -> None:
    good = b'{"step": 1, "loss": 2.0, "lr": NaN, "grad_norm": null, "note": "x"}'
    (tmp_path / LOG_FILE).write_bytes(good + b"\n" + line + b"\n")
    found = log_reader.RunLog(tmp_path)
    assert found.warning == f"{tmp_path / LOG_FILE}: skipped 1 damaged line, the first is line 2"
    assert (found.metric("loss"), found.metric("lr")) == ({1: 2.0}, {})
    reader = log_reader.JsonLinesReader(tmp_path / LOG_FILE, log_reader.parse_line)
    reader.read()
    assert (len(reader.lines), reader.damaged) == (1, 1)
    LogWriter(tmp_path, 1, 0).close()
    assert (tmp_path / LOG_FILE).read_bytes() == good + b"\n"
    assert (tmp_path / f"{LOG_FILE}.damaged").read_bytes() == line + b"\n"


def test_a_log_with_other_ends_of_lines_is_whole(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_bytes(b'{"step": 1, "loss": 2.0}\r{"step": 2, "loss": 1.0}\r\n')
    assert log_reader.read_metric(tmp_path, "loss") == {1: 2.0, 2: 1.0}


def test_a_damaged_ledger_is_named_and_the_rest_of_it_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sample_log").mkdir()
    path = tmp_path / "sample_log" / "attempt-00001.rank-00000.jsonl"
    line = b'{"step": 0, "micro_batch": 0, "image_ids": [1]}\n'
    path.write_bytes(line + GARBAGE + b"\n" + b'{"step": 1, "num')
    (path.parent / "attempt-00001.rank-00000 (copy).jsonl").write_bytes(line)
    assert sample_log.read(tmp_path) == {(0, 0): [[1]]}
    assert f"{path}: skipped 1 damaged line, the first is line 2" in capsys.readouterr().err


def link(path: Path) -> None:
    path.with_name("precious").write_text("of a user")
    path.symlink_to("precious")


@pytest.mark.parametrize(
    ("make", "found"),
    [(Path.mkdir, "Is a directory"), (os.mkfifo, "Not a regular file"), (link, "is a link")],
)
def test_a_lock_that_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / files.LOCK)
    with (
        pytest.raises(UserError, match=rf"{files.LOCK}: .*{found}.*; remove it"),
        files.lock(tmp_path, "a test"),
    ):
        pass
    if make is link:
        assert (tmp_path / "precious").read_text() == "of a user"


def test_a_lock_of_any_bytes_is_taken_and_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / files.LOCK).write_bytes(GARBAGE + b"\n\x1b[2J" + bytes(10**6))
    assert files.lock_holder(tmp_path).isprintable()
    with files.lock(tmp_path, "a test"):
        assert files.lock_holder(tmp_path) == f"a test, process {os.getpid()} on {os.uname().nodename}"


def test_a_packing_plan_of_other_bytes_is_named(
    synthetic_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".packing").mkdir()
    (tmp_path / ".packing" / "plan").write_bytes(b'{"tool": "\xff", "splits": {}}')
    captions = synthetic_coco / "annotations" / "captions_val2017.json"
    arguments = [
        "--images",
        synthetic_coco / "val2017",
        "--captions",
        captions,
        "--split",
        "val",
        "--out",
        tmp_path,
    ]
    with pytest.raises(SystemExit):
        main(["pack", "coco", *map(str, arguments)])
    assert f"{tmp_path / '.packing' / 'plan'}: damaged;" in capsys.readouterr().err


def test_settings_that_are_a_folder_are_named(
    done: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(done, tmp_path / "run"))
    (run / "config.toml").unlink()
    (run / "config.toml").mkdir()
    tiny_config(tmp_path, packed)
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "experiment.toml"), "--out", str(run)])
    assert f"{run / 'config.toml'}: cannot be written" in capsys.readouterr().err


def test_only_names_that_are_our_own_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shards, run = tmp_path / "shards", tmp_path / "run"
    kept = [
        run / "checkpoints" / "step-00000001.backup.tmp",
        run / "checkpoints" / "best.tmp",
        shards / "features" / "notes.tmp",
        shards / "features" / "train-0123456789abcdef.npy.tmp.mine",
        tmp_path / "captionscale-work-mine",
        tmp_path / "model.tmp",
    ]
    removed = [
        run / "checkpoints" / "step-00000001.tmp",
        shards / "features" / "train-0123456789abcdef.npy.tmp",
        tmp_path / "captionscale-work-java-abcdefgh",
    ]
    for path in (*kept, *removed):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffixes[-2:] == [".npy", ".tmp"]:
            path.write_bytes(b"begun")
        else:
            path.mkdir()
    remove_partial_checkpoints(run)
    create_all([FeatureFile(shards / "features" / "val-0123456789abcdef.npy", (2, 1, 4))])
    with files.temp_folder("java"), bundle._new(tmp_path / "model"):
        pass
    assert [path for path in kept if not path.exists()] == []
    assert [path for path in removed if path.exists()] == []
