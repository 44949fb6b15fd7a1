"""Shards that somebody has changed after they were packed, in files of the same size."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from experiment import peaked_run, spawn_ranks, tiny_config

from captionscale import toml
from captionscale.cli import main
from captionscale.config import Config
from captionscale.data.shards import Split
from captionscale.errors import UserError


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Shards of one's own, to change."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def change(shards: Path, split_name: str, part: str) -> str:
    """Change one word of a caption, or one bit of an image; return what an error says of the place."""
    split = Split(shards, split_name)
    for item in range(len(split)):
        row = split.index[item]
        tar = shards / split.info.shards[int(row["shard"])].name
        start, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
        data = bytearray(tar.read_bytes())
        sample = bytes(data[start : start + size])
        if part == "json" and b"yellow" not in sample:
            continue
        changed = (
            sample.replace(b"yellow", b"purple") if part == "json" else sample[:-9] + b"\x55" + sample[-8:]
        )
        assert len(changed) == size
        assert changed != sample
        data[start : start + size] = changed
        tar.write_bytes(data)
        what = "captions at byte" if part == "json" else "bytes at"
        return f"{tar}: image {row['image_id']}: the {what} {start:,} are not those packed; found xxh3 "
    raise AssertionError("no caption holds the word")


def refused(words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command that fails says at last."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("part", ["json", "image"])
def test_a_changed_word_or_image_is_not_scored(
    copy: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = peaked_run(tmp_path, copy)
    place = change(copy, "val", part)
    said = refused(["score", run, "--split", "val"], capsys)
    assert said.startswith(f"captionscale: {place}")
    assert re.search(r"found xxh3 \w{16}, expected \w{16}; copy it again from an intact source", said)
    assert not [*(run / "scores").rglob("receipt.json")]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("json", ["stats", "SHARDS"]),
        ("json", ["train", "EXPERIMENT", "--out", "OUT"]),
        ("image", ["train", "EXPERIMENT", "--out", "OUT"]),
        ("image", ["train", "EXPERIMENT", "--out", "OUT", "--set", "train.cache_features=true"]),
        ("image", ["caption", "RUN", "--split", "train", "--out", "OUT"]),
        ("image", ["attend", "RUN", "--split", "train", "--out", "OUT"]),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words[:1] + words[4:]),
)
def test_every_command_that_reads_shards_refuses_a_changed_one(
    copy: Path, tmp_path: Path, part: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = peaked_run(tmp_path, copy)
    tiny_config(
        tmp_path,
        copy,
        'model.encoder.trainable="none"',
        "data.flip=false",
        "data.crop_scale=[1, 1]",
        "data.color_jitter=0",
    )
    place = change(copy, "train", part)
    names = {
        "SHARDS": copy,
        "EXPERIMENT": tmp_path / "experiment.toml",
        "RUN": run,
        "OUT": tmp_path / "out",
    }
    assert place in refused([names.get(word, word) for word in words], capsys)


@pytest.mark.parametrize("part", ["json", "image"])
def test_show_refuses_a_changed_sample(
    copy: Path, part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = change(copy, "train", part)
    image_id = re.findall(r"image (\d+)", place)[0]
    assert place in refused(["show", copy, image_id, "--out", tmp_path / "saved"], capsys)
    assert not (tmp_path / "saved").exists()


def test_the_captions_of_another_image_are_named_as_such(copy: Path) -> None:
    index = Split(copy, "train").index
    first, second = next(
        (a, b) for a in range(16) for b in range(a) if index["json_size"][a] == index["json_size"][b]
    )
    tar = copy / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    one, other = (
        slice(int(row["json_offset"]), int(row["json_offset"] + row["json_size"]))
        for row in index[[first, second]]
    )
    data[one], data[other] = data[other], data[one]
    tar.write_bytes(data)
    with pytest.raises(UserError, match=f"are those of image {index['image_id'][second]}; found"):
        Split(copy, "train").captions(first)


@pytest.mark.parametrize("changed", [5, 12])
def test_verify_says_the_first_problems_and_their_number_and_all_of_them_for_programs(
    copy: Path, changed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = copy / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    ids = []
    for row in Split(copy, "train").index[:changed]:
        data[int(row["image_offset"]) + 30] ^= 1
        ids.append(int(row["image_id"]))
    tar.write_bytes(data)
    with pytest.raises(SystemExit):
        main(["verify", str(copy)])
    *lines, verdict = capsys.readouterr().err.splitlines()[-(7 if changed > 5 else 6) :]
    told = [f"image {image_id}: the bytes at" in line for image_id, line in zip(ids, lines, strict=False)]
    assert told == [True] * 5 + [False] * (changed > 5)
    assert lines[5:] == ["... and 7 more; --json lists all 12"] * (changed > 5)
    assert verdict == f"{copy}: NOT as packed; problems: {changed}"

    with pytest.raises(SystemExit) as ended:
        main(["verify", str(copy), "--json"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["images"] == {"train": 48, "val": 8, "test": 8}
    assert [re.findall(r"image (\d+)", line)[0] for line in found["problems"]] == [*map(str, ids)]
    assert said.err.splitlines()[-1] == f"captionscale: {copy}: NOT as packed; problems: {changed}"


def _train_and_tell(settings: str, folder: Path) -> None:
    """Train as a rank, and write down how that ended."""
    import os
    import tomllib

    from captionscale.train.loop import train

    try:
        train(Config.model_validate(tomllib.loads(settings)), folder / "run")
    except Exception as error:
        (folder / f"rank-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def test_of_two_ranks_that_train_the_one_that_reads_it_tells_and_neither_waits(
    copy: Path, tmp_path: Path
) -> None:
    settings = tiny_config(tmp_path, copy, "train.epochs=50")
    place = change(copy, "train", "image")
    ranks = spawn_ranks(2, _train_and_tell, toml.dumps(settings), tmp_path)
    for rank in ranks:
        rank.wait(600)
    assert [rank.returncode for rank in ranks] == [1, 1]
    told = [(tmp_path / f"rank-{number}").read_text() for number in range(2)]
    assert sum(place in it and it.startswith("UserError: ") for it in told) == 1
