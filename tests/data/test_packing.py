import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from captionscale.data import sources
from captionscale.data.packing import pack
from captionscale.data.shards import Split, read_manifest, verify
from captionscale.data.sources import Record
from captionscale.errors import UserError
from captionscale.files import LOCK, lock, sha256_of


def captions_of(scenes: Path, split: str) -> Path:
    return scenes / "annotations" / f"captions_{split}2017.json"


def records_of(scenes: Path, split: str) -> list[Record]:
    return sources.coco(scenes / f"{split}2017", captions_of(scenes, split), split)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoilt(records: list[Record], number: int, file: Path) -> list[Record]:
    """Return records of which one has another file."""
    old = records[number]
    return [*records[:number], Record(old.image_id, file, old.split, old.captions), *records[number + 1 :]]


# Its reader leaves files to the garbage collector.
streaming = pytest.mark.filterwarnings("ignore::ResourceWarning")


def stream(tars: list[Path]) -> list[dict[str, Any]]:
    """Return what webdataset's own reader finds."""
    return list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))


# ---- what is written


@streaming
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_webdataset_reads_back_what_was_packed_in_its_order(scenes: Path, packed: Path, split: str) -> None:
    tars = sorted(packed.glob(f"{split}-*.tar"))
    samples = stream(tars)
    records = records_of(scenes, split)
    assert len(tars) == -(-len(records) // 16)
    for sample, record in zip(samples, records, strict=True):
        assert sample["__key__"] == f"{record.image_id:012d}"
        assert sample["jpg"] == record.file.read_bytes()
        assert json.loads(sample["json"]) == {
            "image_id": record.image_id,
            "file": record.file.name,
            "captions": list(record.captions),
        }


@streaming
def test_webdataset_decodes_every_kind_of_picture_by_its_name(tmp_path: Path) -> None:
    # Once, only JPEGs could be packed: Pillow refused all others, and in a tar .json stands before .png.
    pixels = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    names = ("a.jpg", "b.png", "c.webp", "d.gif", "e.bmp", "JPEG called.png")
    records = []
    for image_id, name in enumerate(names):
        kind = None if "called" not in name else "JPEG"
        Image.fromarray(pixels).save(tmp_path / name, kind)
        records.append(Record(image_id, tmp_path / name, "train", ("a dog", "日本 ø")[: 1 + image_id % 2]))
    out = tmp_path / "shards"
    pack(records, out, sources=[], images_per_shard=4)
    assert not list(verify(out))
    split = Split(out, "train")
    decoded = webdataset.WebDataset([str(path) for path in split.paths], shardshuffle=False).decode("rgb8")
    for item, (sample, record) in enumerate(zip(decoded, records, strict=True)):
        (extension,) = {"jpg", "png", "webp", "gif", "bmp"} & set(sample)
        assert extension == ("jpg" if "called" in record.file.name else record.file.suffix[1:])
        assert split.image(item) == record.file.read_bytes()
        assert split.captions(item) == sample["json"]["captions"] == list(record.captions)
        if extension in ("jpg", "png", "webp"):
            assert np.shape(sample[extension]) == (20, 30, 3)


def test_the_manifest_says_what_was_packed_from_what(scenes: Path, packed: Path) -> None:
    manifest = read_manifest(packed)
    assert manifest["format"] == 1
    assert manifest["images"] == "original"
    assert list(manifest["splits"]) == ["train", "val", "test"]
    for split, facts in manifest["splits"].items():
        records = records_of(scenes, split)
        source = captions_of(scenes, split)
        assert facts["images"] == len(records) == sum(shard["images"] for shard in facts["shards"])
        assert facts["captions"] == sum(len(record.captions) for record in records)
        assert facts["sources"] == {source.name: sha256_of(source)}
        for shard in facts["shards"]:
            path = packed / shard["name"]
            assert (shard["size_bytes"], shard["sha256"]) == (path.stat().st_size, sha256_of(path))
    assert [shard["images"] for shard in manifest["splits"]["train"]["shards"]] == [16, 16, 16]


def test_packing_twice_gives_the_same_bytes(scenes: Path, packed: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        source = captions_of(scenes, split)
        pack(records_of(scenes, split), tmp_path / "again", sources=[source], images_per_shard=16)
    assert contents(tmp_path / "again") == contents(packed)


def test_the_last_shard_holds_the_rest_and_progress_counts_every_image(scenes: Path, tmp_path: Path) -> None:
    ticks: list[None] = []
    pack(
        records_of(scenes, "train"),
        tmp_path / "shards",
        sources=[],
        images_per_shard=20,
        progress=lambda: ticks.append(None),
    )
    assert Split(tmp_path / "shards", "train").shard_sizes.tolist() == [20, 20, 8]
    assert len(ticks) == 48


def test_splits_packed_one_by_one_or_together_are_the_same_shards(scenes: Path, tmp_path: Path) -> None:
    train, val = records_of(scenes, "train")[:12], records_of(scenes, "val")
    pack([*val, *train], tmp_path / "together", sources=[], images_per_shard=5)
    pack(val, tmp_path / "one by one", sources=[], images_per_shard=5)
    before = contents(tmp_path / "one by one")
    pack(train, tmp_path / "one by one", sources=[], images_per_shard=5)
    after = contents(tmp_path / "one by one")
    assert after == contents(tmp_path / "together")
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}


# ---- what is refused


def test_a_split_that_is_there_is_refused(scenes: Path, packed: Path) -> None:
    before = contents(packed)
    with pytest.raises(UserError, match="split 'val' is packed already"):
        pack(records_of(scenes, "val"), packed, sources=[])
    assert contents(packed) == before


def test_an_image_of_another_split_is_refused(scenes: Path, packed: Path) -> None:
    before = contents(packed)
    leak = [
        Record(record.image_id, record.file, "holdout", record.captions)
        for record in records_of(scenes, "test")
    ]
    with pytest.raises(
        UserError, match=f"8 images of split 'holdout', such as image {leak[0].image_id}, are"
    ):
        pack(leak, packed, sources=[])
    assert contents(packed) == before


def test_an_image_in_two_splits_of_one_call_is_refused(scenes: Path, tmp_path: Path) -> None:
    val = records_of(scenes, "val")
    leak = Record(val[3].image_id, val[3].file, "test", val[3].captions)
    with pytest.raises(UserError, match=f"'val', such as image {leak.image_id}, are in split 'test' too"):
        pack([*val, leak], tmp_path / "shards", sources=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda data: data[:-40], lambda _: b"<html>"],
    ids=["empty", "truncated", "html"],
)
@pytest.mark.parametrize("number", [0, 20, 47])
def test_an_unreadable_image_is_named_and_nothing_is_left(
    scenes: Path, tmp_path: Path, number: int, damage: Callable[[bytes], bytes]
) -> None:
    records = records_of(scenes, "train")
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(damage(records[number].file.read_bytes()))
    with pytest.raises(UserError, match=rf"{bad}: not a readable image .* bytes; .*repair or remove it"):
        pack(spoilt(records, number, bad), tmp_path / "made" / "shards", sources=[], images_per_shard=16)
    assert not (tmp_path / "made" / "shards").exists()


def test_a_missing_image_is_named_and_nothing_is_left(scenes: Path, tmp_path: Path) -> None:
    records = spoilt(records_of(scenes, "val"), 5, tmp_path / "gone.jpg")
    with pytest.raises(UserError, match=r"gone\.jpg: cannot be read"):
        pack(records, tmp_path / "shards", sources=[], images_per_shard=4)
    assert not list(tmp_path.iterdir())


def test_another_packer_at_work_is_told_and_not_disturbed(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    with lock(out, "captionscale pack"):
        with pytest.raises(UserError, match=f"in use by captionscale pack, process {os.getpid()} on"):
            pack(records_of(scenes, "val"), out, sources=[])
        assert [path.name for path in out.iterdir()] == [LOCK]
    pack(records_of(scenes, "val"), out, sources=[])
    assert not list(verify(out))


# ---- what an interruption leaves


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_pack_that_is_stopped_after_its_first_shard_leaves_nothing(
    scenes: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    images = iter(range(48))

    def stop() -> None:
        if next(images) == 20:
            raise error

    out = tmp_path / "shards"
    with pytest.raises(error):
        pack(records_of(scenes, "train"), out, sources=[], images_per_shard=16, progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_is_full_at_any_write_leaves_what_was_there(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    out = tmp_path / "shards"
    if beside:
        pack(records_of(scenes, "val"), out, sources=[])
    before = contents(out) if beside else {}
    train = records_of(scenes, "train")
    # Three shards, the index, the manifest.
    for write in range(5):
        left = iter(range(write))

        def full(_: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"cannot be written \(No space left"):
                pack(train, out, sources=[], images_per_shard=16)
        assert out.exists() == beside
        assert (contents(out) if beside else {}) == before
    pack(train, out, sources=[], images_per_shard=16)
    assert not list(verify(out))
