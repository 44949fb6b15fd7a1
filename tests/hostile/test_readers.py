"""Files that fuzzing found: each is refused in one line, in bounded time and memory."""

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from blake3 import blake3
from experiment import tiny_config

from captionscale import credentials
from captionscale.cli import main
from captionscale.data import decode
from captionscale.data.manifest import MANIFEST, read
from captionscale.data.packing import first_image_id
from captionscale.data.sources import custom, tars
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.files import LOCK, UnfitFileError, atomic_write, lock, read_file
from captionscale.progress import Bar
from captionscale.tools.profiles import read_profile
from captionscale.train import validation
from captionscale.train.setup import Run
from captionscale.train.state import TrainState
from captionscale.train.watchdog import Watchdog

BOMB = "a: &a [x]\n" + "".join(
    f"{chr(n)}: &{chr(n)} [{', '.join([f'*{chr(n - 1)}'] * 9)}]\n" for n in range(98, 110)
)
PROFILES = {
    "infinite": "num_processes: .inf\n",
    "empty number": 'num_processes: !!int ""\n',
    "too many processes": "num_processes: 99999999999999\n",
    "no timestamp": "num_processes: !!timestamp x\n",
    "aliases": f"{BOMB}num_processes: 1\ndistributed_type: *m\n",
    "a long name": f"num_processes: 1\ndistributed_type: {'x' * 100_000}\n",
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_crafted_profile_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(PROFILES[name])
    with pytest.raises(UserError) as refused:
        read_profile(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value)) < 1_000


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


TARS = {
    "a size below zero": member("1.jpg", -1024),
    "a size beyond all files": member("1.jpg", 2**63),
    "a long name beyond memory": member("1", 2**50, tarfile.GNUTYPE_LONGNAME),
    "names of names": (member("1", 1, tarfile.GNUTYPE_LONGNAME) + bytes(512)) * 5_000,
    "cut short": member("1.jpg", 5_000),
}


@pytest.mark.parametrize("name", TARS)
def test_a_crafted_tar_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "1.tar"
    path.write_bytes(TARS[name])
    with pytest.raises(UserError, match=r"1\.tar: damaged or cut short at byte"):
        list(tars.iter_members(path))


def test_verify_reports_a_tar_whose_hash_fits_but_whose_directory_does_not(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(shutil.copytree(packed, tmp_path / "shards"))
    path = next(shards.glob("val-*.tar"))
    data = path.read_bytes()
    # The size of the first member only: what the index points to is as it was.
    with tarfile.open(path) as tar:
        first = tar.getmembers()[0]
    damaged = member(first.name, -1024) + data[512:]
    path.write_bytes(damaged)
    facts = json.loads((shards / MANIFEST).read_bytes())
    for shard in facts["splits"]["val"]["shards"]:
        if shard["name"] == path.name:
            shard["blake3"] = blake3(damaged).hexdigest()
    (shards / MANIFEST).write_text(json.dumps(facts))
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(shards)])
    assert f"{path}: damaged or cut short at byte 0" in "".join(capsys.readouterr())


def test_links_in_a_circle_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1.tar").symlink_to("1.tar")
    with pytest.raises(SystemExit, match="1"):
        main(["pack", "webdataset", "--tars", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "Too many levels of symbolic links" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "--captions", "a.json", "--references", "loop.json", "--out", "receipt.json"],
        ["score", "--captions", "loop.json", "--references", "a.json", "--out", "receipt.json"],
        ["board", "loop.json", "--out", "board.html"],
        ["compare", "loop.json", "a.json"],
    ],
    ids=" ".join,
)
def test_a_link_to_itself_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop.json").symlink_to("loop.json")
    Path("a.json").write_text("[]")
    Path("receipt.json").write_text("[]")
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    [line] = capsys.readouterr().err.splitlines()
    assert "json: " in line
    assert Path("receipt.json").read_text() == "[]"


def test_a_line_of_a_table_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom, "_MAX_LINE_BYTES", 100)
    table = tmp_path / "table.jsonl"
    with table.open("wb") as file:
        file.write(b'{"image": "a.jpg", "caption": "a"}\n')
        file.truncate(1 << 42)
    with pytest.raises(UserError, match=r"table.jsonl: line 2: 100 bytes or more, expected the row of one"):
        custom.read_table(table, tmp_path, "train", lambda _: 1)


def test_an_error_of_a_manifest_is_short_and_one_without_splits_is_no_traceback(
    packed: Path, tmp_path: Path
) -> None:
    tree = json.loads((packed / MANIFEST).read_bytes())
    (tmp_path / MANIFEST).write_text(json.dumps(tree | {"[" * 100_000: 1}))
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 1000
    (tmp_path / MANIFEST).write_text(json.dumps(tree | {"splits": {}}))
    assert first_image_id(tmp_path, ["test"]) == 1


def test_a_long_text_is_searched_for_urls_in_linear_time() -> None:
    # With an unbounded scheme this takes minutes.
    text = "x" * 1_000_000
    assert credentials.strip(text) == text
    assert credentials.strip(f"{text}://me:secret@host/a") == f"{text}://host/a"


def test_an_image_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "1.jpg"
    with path.open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(UserError, match=r"1\.jpg: at least 4,398,046,511,104 bytes, expected at most"):
        decode.read_image(path)
    for size in (None, 1 << 42):
        source = str(tmp_path if size is None else path)
        with pytest.raises(EOFError, match="4,398,046,511,104 bytes, expected at most"):
            Record(1, "train", (), source, "1.jpg", 0, size).read()


def test_a_users_file_beside_what_is_written_stays(tmp_path: Path) -> None:
    path, own = tmp_path / "x.json", tmp_path / "x.json.tmp"
    own.write_text("mine")
    for _ in range(2):
        with atomic_write(path) as file:
            file.write(b"ours")
            (left,) = set(tmp_path.iterdir()) - {path, own}
    # As a killed process leaves it, or somebody who may write here: it is not followed.
    left.symlink_to(own)
    with atomic_write(path) as file:
        file.write(b"again")
    assert (own.read_text(), path.read_bytes()) == ("mine", b"again")
    assert sorted(tmp_path.iterdir()) == [path, own]


def test_a_full_disk_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(UserError, match=rf"{LOCK}: cannot be written \(No space left on device\)"),
        lock(tmp_path / "out", "pack"),
    ):
        pass


@pytest.mark.parametrize("place", [lambda pipe: f"/dev/fd/{pipe}", lambda pipe: f"/proc/self/fd/{pipe}"])
def test_a_pipe_of_this_process_is_read(place: Callable[[int], str]) -> None:
    reader, writer = os.pipe()
    with subprocess.Popen(["echo", "ab"], stdout=writer):
        os.close(writer)
        assert read_file(Path(place(reader)), 3) == b"ab\n"
    os.close(reader)
    reader, writer = os.pipe()
    os.write(writer, b"abcd")
    os.close(writer)
    with pytest.raises(UnfitFileError, match="expected at most 3"):
        read_file(Path(place(reader)), 3)
    os.close(reader)


def test_a_model_larger_than_memory_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = '{name="plain", embed_size=16384, hidden_size=16384, num_layers=64}'
    tiny_config(tmp_path, packed, f"model.decoder={decoder}")
    with pytest.raises(SystemExit, match="1"):
        main(["train", str(tmp_path / "experiment.toml"), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert "captionscale: model: its weights take " in error
    assert "lower model.decoder.hidden_size, embed_size or num_layers" in error


OWED = {
    "missing": (None, "No such file or directory"),
    "garbage": (b"\x80", "no COCO results"),
    "deep": (b"[" * 100_000, "no COCO results"),
    "other images": (b'[{"image_id": 7, "caption": "a dog"}]', "not the captions of the validation split"),
    "whole": (b'[{"image_id": 1, "caption": "a dog"}]', ""),
}


@pytest.mark.parametrize("name", OWED)
def test_captions_that_cannot_be_scored_do_not_end_a_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, fault = OWED[name]
    scorer = Mock()
    monkeypatch.setattr(validation, "find_java", lambda: None)
    monkeypatch.setattr(validation, "BackgroundScorer", lambda *_: scorer)
    split = SimpleNamespace(index={"image_id": np.array([1])}, references=lambda: {1: ["a dog"]})
    job = Mock(
        spec=Run,
        folder=tmp_path,
        train_state=TrainState(step=2, validated_step=2),
        ranks=SimpleNamespace(run_on_main=lambda work, *given: work(*given)),
        val_loader=SimpleNamespace(split=split),
        config=SimpleNamespace(train=SimpleNamespace(score_metric="CIDEr-D")),
    )
    path = tmp_path / "validation" / "step-00000002.json"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    told: list[str] = []
    validation.Validation(job, None, Mock(spec=Bar, say=told.append), Mock(spec=Watchdog))
    if fault:
        [line] = told
        assert line.startswith(f"warning: {path}: ")
        assert fault in line
        assert line.endswith("; step 2 will have no scores")
        assert job.train_state.validated_step == job.train_state.scored_step == 0
    else:
        scorer.submit.assert_called_once_with({1: "a dog"})
        assert (told, job.train_state.validated_step) == ([], 2)
