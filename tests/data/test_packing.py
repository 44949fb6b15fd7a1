import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from captionscale.data import manifest
from captionscale.data.packing import PackOptions, first_image_id, pack
from captionscale.data.shard_writer import REJECTED, read_rejected
from captionscale.data.shards import Split
from captionscale.data.sources import coco
from captionscale.data.sources.record import Record
from captionscale.data.verification import verify
from captionscale.errors import UserError
from captionscale.files import LOCK, blake3_of, lock, sha256_of

SMALL = PackOptions(images_per_shard=16)


def captions_of(synthetic_coco: Path, split: str) -> Path:
    return synthetic_coco / "annotations" / f"captions_{split}2017.json"


def records_of(synthetic_coco: Path, split: str) -> list[Record]:
    return coco.read_official(synthetic_coco / f"{split}2017", captions_of(synthetic_coco, split), split)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_file(records: list[Record], number: int, file: Path) -> list[Record]:
    """Return records of which one has another file."""
    bad = replace(records[number], source=str(file.parent), name=file.name)
    return [*records[:number], bad, *records[number + 1 :]]


# Its reader leaves files to the garbage collector.
streaming = pytest.mark.filterwarnings("ignore::ResourceWarning")


def stream(tars: list[Path]) -> list[dict[str, Any]]:
    """Return what webdataset's own reader finds."""
    return list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))


# ---- what is written


@streaming
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_webdataset_reads_back_what_was_packed_in_its_order(
    synthetic_coco: Path, packed: Path, split: str
) -> None:
    tars = sorted(packed.glob(f"{split}-*.tar"))
    samples = stream(tars)
    records = records_of(synthetic_coco, split)
    assert len(tars) == -(-len(records) // 16)
    for sample, record in zip(samples, records, strict=True):
        assert sample["__key__"] == f"{record.image_id:012d}"
        assert sample["jpg"] == record.read()
        assert json.loads(sample["json"]) == {
            "image_id": record.image_id,
            "file": record.name,
            "captions": list(record.captions),
        }


def test_plain_tar_unpacks_the_original_files(synthetic_coco: Path, packed: Path, tmp_path: Path) -> None:
    for shard in packed.glob("train-*.tar"):
        done = subprocess.run(["tar", "-xf", shard], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
    for record in records_of(synthetic_coco, "train"):
        assert (tmp_path / f"{record.image_id:012d}.jpg").read_bytes() == record.read()


def test_tars_are_those_that_webdataset_would_have_written(packed: Path, tmp_path: Path) -> None:
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(tmp_path / path.name, "w", format=tarfile.USTAR_FORMAT) as again:
            for member, data in members:
                assert member.mtime == 0
                assert (member.uname, member.gname) == ("captionscale", "captionscale")
                again.addfile(member, io.BytesIO(data))
        # tarfile fills the last record of 10,240 bytes with zeros.
        whole, plain = (tmp_path / path.name).read_bytes(), path.read_bytes()
        assert whole.startswith(plain)
        assert not any(whole[len(plain) :])


@streaming
def test_webdataset_decodes_every_image_format_by_its_name(tmp_path: Path) -> None:
    # Once, only JPEGs could be packed: Pillow refused all others.
    pixels = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    names = ("a.jpg", "b.png", "c.webp", "d.gif", "e.bmp", "JPEG called.png")
    records = []
    for image_id, name in enumerate(names):
        kind = None if "called" not in name else "JPEG"
        Image.fromarray(pixels).save(tmp_path / name, kind)
        captions = ("a dog", "日本 ø")[: 1 + image_id % 2]
        records.append(Record(image_id, "train", captions, str(tmp_path), name))
    out = tmp_path / "shards"
    pack(records, out, sources=[], options=PackOptions(images_per_shard=4))
    split = Split(out, "train")
    assert (split.index["width"].tolist(), split.index["height"].tolist()) == ([30] * 6, [20] * 6)
    decoded = webdataset.WebDataset(
        [str(path) for path in sorted(out.glob("*.tar"))], shardshuffle=False
    ).decode("rgb8")
    for item, (sample, record) in enumerate(zip(decoded, records, strict=True)):
        (extension,) = {"jpg", "png", "webp", "gif", "bmp"} & set(sample)
        assert extension == ("jpg" if "called" in record.name else Path(record.name).suffix[1:])
        assert split.image(item) == record.read()
        assert list(split.captions(item)) == sample["json"]["captions"] == list(record.captions)
        if extension in ("jpg", "png", "webp"):
            assert np.shape(sample[extension]) == (20, 30, 3)


def test_the_manifest_records_counts_and_sources(synthetic_coco: Path, packed: Path) -> None:
    found = manifest.read(packed)
    assert found.format == manifest.FORMAT
    assert str(found.images) == "original"
    assert list(found.splits) == ["train", "val", "test"]
    for split, facts in found.splits.items():
        records = records_of(synthetic_coco, split)
        source = captions_of(synthetic_coco, split)
        assert facts.images == len(records) == sum(shard.images for shard in facts.shards)
        assert facts.captions == sum(len(record.captions) for record in records)
        assert facts.sources == {source.name: sha256_of(source)}
        assert facts.tool.startswith("captionscale ")
        for shard in facts.shards:
            path = packed / shard.name
            assert (shard.size_bytes, shard.blake3) == (path.stat().st_size, blake3_of(path))
    assert [shard.images for shard in found.splits["train"].shards] == [16, 16, 16]


def test_the_last_shard_holds_the_rest_and_progress_counts_every_image(
    synthetic_coco: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    records = records_of(synthetic_coco, "train")
    pack(records, tmp_path, sources=[], options=PackOptions(images_per_shard=20), progress=seen.append)
    assert Split(tmp_path, "train").shard_sizes.tolist() == [20, 20, 8]
    assert seen == [20, 20, 8]


def test_splits_packed_one_by_one_or_together_are_the_same_shards(
    synthetic_coco: Path, tmp_path: Path
) -> None:
    train, val = records_of(synthetic_coco, "train")[:12], records_of(synthetic_coco, "val")
    options = PackOptions(images_per_shard=5)
    pack([*val, *train], tmp_path / "together", sources=[], options=options)
    pack(val, tmp_path / "one by one", sources=[], options=options)
    before = contents(tmp_path / "one by one")
    pack(train, tmp_path / "one by one", sources=[], options=options)
    after = contents(tmp_path / "one by one")
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    together = contents(tmp_path / "together")
    assert (
        json.loads(after.pop("manifest.json"))["splits"]
        == json.loads(together.pop("manifest.json"))["splits"]
    )
    assert after == together


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    synthetic_coco: Path, packed: Path, tmp_path: Path, workers: int
) -> None:
    for split in ("train", "val", "test"):
        options = replace(SMALL, workers=workers)
        pack(
            records_of(synthetic_coco, split),
            tmp_path,
            sources=[captions_of(synthetic_coco, split)],
            options=options,
        )
    assert contents(tmp_path) == contents(packed)


def test_resized_images_have_the_requested_side(synthetic_coco: Path, tmp_path: Path) -> None:
    records = records_of(synthetic_coco, "val")
    for workers in (1, 2):
        out = tmp_path / str(workers)
        pack(records, out, sources=[], options=PackOptions(3, short_side=32, workers=workers))
        assert set(Split(out, "val").index["width"].tolist()) == {32}
        assert "torch" in manifest.read(out).splits["val"].tool
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_member_of_a_tar_is_packed_like_a_file(synthetic_coco: Path, packed: Path, tmp_path: Path) -> None:
    split = Split(packed, "val")
    records = []
    for record, row in zip(records_of(synthetic_coco, "val"), split.index, strict=True):
        place = {"offset": int(row["image_offset"]), "size": int(row["image_size"])}
        records.append(replace(record, source=str(packed / "val-00000.tar"), **place))
    pack(records, tmp_path, sources=[], options=SMALL)
    assert (tmp_path / "val-00000.tar").read_bytes() == (packed / "val-00000.tar").read_bytes()


def test_images_without_captions_are_packed(synthetic_coco: Path, tmp_path: Path) -> None:
    pack([replace(it, captions=()) for it in records_of(synthetic_coco, "test")], tmp_path, sources=[])
    assert manifest.read(tmp_path).splits["test"].captions == 0
    assert verify(tmp_path).problems == []


# ---- images that cannot be read


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda data: data[:-40], lambda _: b"<html>"],
    ids=["empty", "truncated", "html"],
)
@pytest.mark.parametrize("number", [0, 20, 47])
def test_an_unreadable_image_is_left_out_and_written_down(
    synthetic_coco: Path, tmp_path: Path, number: int, damage: Callable[[bytes], bytes]
) -> None:
    records = records_of(synthetic_coco, "train")
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(damage(records[number].read()))
    out = tmp_path / "shards"
    pack(with_file(records, number, bad), out, sources=[], options=replace(SMALL, max_rejected=0.03))
    (rejected,) = read_rejected(out)
    assert (rejected.image_id, rejected.file, rejected.split) == (records[number].image_id, str(bad), "train")
    assert rejected.reason.startswith("not a readable image (")
    split = Split(out, "train")
    left = [record.image_id for record in records if record.image_id != rejected.image_id]
    assert split.index["image_id"].tolist() == left
    # What is rejected moves no image to another shard.
    assert split.shard_sizes.tolist() == [16 - (number // 16 == shard) for shard in range(3)]
    assert split.info.rejected == 1
    assert verify(out).problems == []


def test_more_unreadable_images_than_allowed_are_refused_and_can_be_repaired(
    synthetic_coco: Path, packed: Path, tmp_path: Path
) -> None:
    records = records_of(synthetic_coco, "train")
    folder, out = tmp_path / "images", tmp_path / "shards"
    folder.mkdir()
    for record in records:
        (folder / record.name).write_bytes(record.read())
    moved = [replace(record, source=str(folder)) for record in records]
    (folder / records[30].name).write_bytes(b"<html>")
    source = captions_of(synthetic_coco, "train")
    expected = (
        r"not a readable image .*; 1 of the 48 images of split 'train' cannot be read, expected at most 0.10%"
    )
    with pytest.raises(UserError, match=expected):
        pack(moved, out, sources=[source], options=SMALL)
    assert not (out / manifest.MANIFEST).exists()
    assert [image.image_id for image in read_rejected(out)] == [records[30].image_id]
    (folder / records[30].name).write_bytes(records[30].read())
    pack(moved, out, sources=[source], options=SMALL)
    assert not (out / REJECTED).exists()
    for name in ("train-00000.tar", "train-00001.tar", "train-00002.tar", "train.index.npy"):
        assert (out / name).read_bytes() == (packed / name).read_bytes()


def test_a_missing_image_is_named(synthetic_coco: Path, tmp_path: Path) -> None:
    records = with_file(records_of(synthetic_coco, "val"), 5, tmp_path / "gone.jpg")
    with pytest.raises(UserError, match=r"gone\.jpg: cannot be read \(No such file"):
        pack(records, tmp_path / "shards", sources=[])


def test_headers_alone_show_less_but_the_same_shards(
    synthetic_coco: Path, packed: Path, tmp_path: Path
) -> None:
    records = records_of(synthetic_coco, "val")
    pack(records, tmp_path / "whole", sources=[], options=PackOptions(full_decode=False))
    assert (tmp_path / "whole" / "val-00000.tar").read_bytes() == (packed / "val-00000.tar").read_bytes()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(records[2].read()[:-40])
    pack(with_file(records, 2, bad), tmp_path / "cut", sources=[], options=PackOptions(full_decode=False))
    (problem,) = verify(tmp_path / "cut", deep=True).problems
    assert f"image {records[2].image_id}: not a readable image" in problem


# ---- what is refused


def test_the_same_call_again_changes_nothing_and_another_is_refused(
    synthetic_coco: Path, tmp_path: Path
) -> None:
    val = records_of(synthetic_coco, "val")
    source = captions_of(synthetic_coco, "val")
    made = pack(val, tmp_path, sources=[source], options=SMALL)
    before = contents(tmp_path)
    assert pack(val, tmp_path, sources=[source], options=replace(SMALL, workers=2)) == made
    for records, options in ((val[1:], SMALL), (val, PackOptions(images_per_shard=4))):
        with pytest.raises(UserError, match="split 'val' is packed already, from other files or with other"):
            pack(records, tmp_path, sources=[source], options=options)
    assert contents(tmp_path) == before


def test_an_image_of_another_split_is_refused(synthetic_coco: Path, packed: Path) -> None:
    before = contents(packed)
    leak = [replace(record, split="holdout") for record in records_of(synthetic_coco, "test")]
    expected = f"8 images of split 'holdout', such as image {leak[0].image_id}, are"
    with pytest.raises(UserError, match=expected):
        pack(leak, packed, sources=[], options=SMALL)
    assert contents(packed) == before


def test_an_image_in_two_splits_of_one_call_is_refused(synthetic_coco: Path, tmp_path: Path) -> None:
    val = records_of(synthetic_coco, "val")
    leak = replace(val[3], split="test")
    with pytest.raises(UserError, match=f"'val', such as image {leak.image_id}, are in split 'test' too"):
        pack([*val, leak], tmp_path / "shards", sources=[])
    with pytest.raises(UserError, match=f"split 'val': image {leak.image_id} is there twice"):
        pack([*val, val[3]], tmp_path / "shards", sources=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["", "a/b", "../up", ".hidden", "two words"])
def test_a_split_that_cannot_name_a_file_is_refused(synthetic_coco: Path, tmp_path: Path, split: str) -> None:
    with pytest.raises(UserError, match="expected letters, digits"):
        pack(
            [replace(it, split=split) for it in records_of(synthetic_coco, "val")],
            tmp_path / "out",
            sources=[],
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("image_id", [-1, 1 << 63])
def test_an_id_that_fits_no_index_is_refused(synthetic_coco: Path, tmp_path: Path, image_id: int) -> None:
    records = records_of(synthetic_coco, "val")
    with pytest.raises(UserError, match="image id is below 0 or above"):
        pack([replace(records[0], image_id=image_id), *records[1:]], tmp_path / "out", sources=[])


def test_one_folder_stores_images_in_one_way(synthetic_coco: Path, tmp_path: Path) -> None:
    pack(records_of(synthetic_coco, "val"), tmp_path, sources=[])
    with pytest.raises(UserError, match="stored as original, this call has --resize 32 --quality 95"):
        pack(records_of(synthetic_coco, "test"), tmp_path, sources=[], options=PackOptions(short_side=32))


def test_shards_that_lost_their_manifest_are_not_overwritten(synthetic_coco: Path, tmp_path: Path) -> None:
    # Once, packing another split then made a new manifest, and the first split was orphaned.
    pack(records_of(synthetic_coco, "val"), tmp_path, sources=[])
    (tmp_path / manifest.MANIFEST).unlink()
    before = contents(tmp_path)
    for split in ("val", "test"):
        with pytest.raises(UserError, match=r"val-00000\.tar: no manifest names it"):
            pack(records_of(synthetic_coco, split), tmp_path, sources=[])
    assert contents(tmp_path) == before


def test_a_folder_that_another_process_packs_is_refused(synthetic_coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    with lock(out, "captionscale pack"):
        with pytest.raises(UserError, match=f"in use by captionscale pack, process {os.getpid()} on"):
            pack(records_of(synthetic_coco, "val"), out, sources=[])
        assert [path.name for path in out.iterdir()] == [LOCK]
    pack(records_of(synthetic_coco, "val"), out, sources=[])
    assert verify(out).problems == []


def test_images_without_ids_are_numbered_after_packed_ones(synthetic_coco: Path, tmp_path: Path) -> None:
    def counted(split: str) -> list[Record]:
        start = first_image_id(tmp_path, [split])
        return [replace(it, image_id=start + k) for k, it in enumerate(records_of(synthetic_coco, split))]

    for _ in range(2):
        for split, start in (("train", 1), ("val", 49), ("test", 57)):
            assert first_image_id(tmp_path, [split]) == start
            pack(counted(split), tmp_path, sources=[])


# ---- what an interruption leaves


FULL = """
import resource, signal, sys
from pathlib import Path
from captionscale.data.packing import pack
from captionscale.data.sources import coco

images, captions, out, limit = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
pack(coco.read_official(Path(images), Path(captions), "train"), Path(out), sources=[])
"""


def test_a_tar_of_which_only_the_last_bytes_do_not_fit_is_an_error(
    synthetic_coco: Path, tmp_path: Path
) -> None:
    source, out = captions_of(synthetic_coco, "train"), tmp_path / "shards"
    pack(records_of(synthetic_coco, "train"), tmp_path / "whole", sources=[])
    size = (tmp_path / "whole" / "train-00000.tar").stat().st_size
    command = [
        sys.executable,
        "-c",
        FULL,
        str(synthetic_coco / "train2017"),
        str(source),
        str(out),
        str(size - 1),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("captionscale.errors.UserError: ")
    assert "train-00000.tar: cannot be written (File too large)" in done.stderr
    assert not list(out.glob("*.tar*"))


def test_a_disk_that_fails_is_not_reported_as_a_bad_image(
    synthetic_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, read = records_of(synthetic_coco, "val"), Record.read

    def fail(record: Record) -> bytes:
        if record == records[5]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(record)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "read", fail)
        with pytest.raises(
            UserError, match=r"Stale file handle, a fault of the disk .* run the same command"
        ):
            pack(records, tmp_path, sources=[], options=PackOptions(4, max_rejected=1.0))
    pack(records, tmp_path, sources=[], options=PackOptions(4, max_rejected=1.0))
    assert len(Split(tmp_path, "val")) == 8


def test_what_changed_since_a_killed_call_is_packed_again(synthetic_coco: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "shards"
    folder.mkdir()
    records = [replace(record, source=str(folder)) for record in records_of(synthetic_coco, "val")]
    for record, original in zip(records, records_of(synthetic_coco, "val"), strict=True):
        (folder / record.name).write_bytes(original.read())

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(records, out, sources=[], options=PackOptions(4), progress=stop)
    (folder / records[1].name).write_bytes(records[6].read())
    pack(records, out, sources=[], options=PackOptions(4))
    assert Split(out, "val").image(1) == records[6].read()


def test_a_finished_tar_that_was_cut_since_is_written_again(synthetic_coco: Path, tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    records = records_of(synthetic_coco, "val")
    with pytest.raises(KeyboardInterrupt):
        pack(records, tmp_path, sources=[], options=PackOptions(4), progress=stop)
    path = tmp_path / "val-00000.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    pack(records, tmp_path, sources=[], options=PackOptions(4))
    assert verify(tmp_path).problems == []


def test_images_that_were_mounted_elsewhere_are_the_same_call(synthetic_coco: Path, tmp_path: Path) -> None:
    made = pack(records_of(synthetic_coco, "val"), tmp_path / "shards", sources=[])
    shutil.copytree(synthetic_coco / "val2017", tmp_path / "elsewhere")
    moved = [
        replace(record, source=str(tmp_path / "elsewhere")) for record in records_of(synthetic_coco, "val")
    ]
    assert pack(moved, tmp_path / "shards", sources=[]) == made


def test_a_first_image_that_was_rejected_does_not_shift_the_numbers_of_the_next_call(
    synthetic_coco: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    for _ in range(2):
        start = first_image_id(tmp_path / "shards", ["val"])
        assert start == 1
        records = [replace(it, image_id=start + k) for k, it in enumerate(records_of(synthetic_coco, "val"))]
        options = PackOptions(max_rejected=0.5)
        pack(with_file(records, 0, bad), tmp_path / "shards", sources=[], options=options)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_pipe_or_folder_is_rejected_at_once(synthetic_coco: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.jpg"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    records = with_file(records_of(synthetic_coco, "val"), 3, path)
    made = pack(records, tmp_path / "shards", sources=[], options=PackOptions(max_rejected=0.5))
    assert made.splits["val"].rejected == 1


def test_sources_of_one_name_are_distinguished(synthetic_coco: Path, tmp_path: Path) -> None:
    for folder in ("a/tars", "b/tars"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.tar").write_text(folder)
    sources = [tmp_path / "a/tars/0.tar", tmp_path / "b/tars/0.tar"]
    made = pack(records_of(synthetic_coco, "val"), tmp_path / "shards", sources=sources)
    assert list(made.splits["val"].sources) == ["a/tars/0.tar", "b/tars/0.tar"]


@pytest.mark.parametrize("writes", range(9))
def test_a_disk_that_is_full_at_any_write_loses_nothing(
    synthetic_coco: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    # The plan, three shards with a file each that says that they are finished, the index, the manifest.
    out, train = tmp_path / "shards", records_of(synthetic_coco, "train")
    left = iter(range(writes))

    def full(_: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left"):
            pack(train, out, sources=[captions_of(synthetic_coco, "train")], options=SMALL)
    assert not list(out.rglob("*.tmp"))
    for split in ("train", "val", "test"):
        pack(
            records_of(synthetic_coco, split),
            out,
            sources=[captions_of(synthetic_coco, split)],
            options=SMALL,
        )
    assert contents(out) == contents(packed)


PACK = """
import sys
from pathlib import Path
from captionscale.data.packing import PackOptions, pack
from captionscale.data.sources import coco

if __name__ == "__main__":
    images, captions, out, workers = sys.argv[1:]
    records = coco.read_official(Path(images), Path(captions), "train")
    pack(records, Path(out), sources=[Path(captions)], options=PackOptions(2, workers=int(workers)))
"""


def test_a_pack_killed_at_ten_random_moments_gives_the_bytes_of_an_unkilled_one(
    synthetic_coco: Path, tmp_path: Path
) -> None:
    script, out, random = tmp_path / "pack.py", tmp_path / "killed", Random(0)
    script.write_text(PACK)
    source = captions_of(synthetic_coco, "train")
    whole = pack(
        records_of(synthetic_coco, "train"), tmp_path / "whole", sources=[source], options=PackOptions(2)
    )

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(synthetic_coco / "train2017"), str(source), str(out)]
        return subprocess.Popen([*command, str(random.choice((1, 2, 3)))], stderr=subprocess.PIPE, text=True)

    kills = 0
    for _ in range(10):
        running = start()
        # Once it has begun to write; with luck, in the middle of a shard.
        shards = len(list(out.glob(".packing/*.json")))
        while running.poll() is None and len(list(out.glob(".packing/*.json"))) <= min(shards, 21):
            time.sleep(0.001)
        time.sleep(random.random() * 0.005)
        running.send_signal(signal.SIGKILL)
        _, error = running.communicate()
        assert running.returncode in (-signal.SIGKILL, 0), error
        kills += running.returncode != 0
        if running.returncode == 0:
            for path in [*out.glob("*.*"), *out.glob(".packing/*")]:
                path.unlink()
    assert kills >= 5
    running = start()
    _, error = running.communicate()
    assert running.returncode == 0, error
    assert contents(out) == contents(tmp_path / "whole")
    assert manifest.read(out) == whole


def test_what_a_killed_call_left_is_finished_by_no_other_call(synthetic_coco: Path, tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    train, val = records_of(synthetic_coco, "train"), records_of(synthetic_coco, "val")
    with pytest.raises(KeyboardInterrupt):
        pack(train, tmp_path, sources=[], options=SMALL, progress=stop)
    for records, options in ((train[1:], SMALL), (train, PackOptions(images_per_shard=8)), (val, SMALL)):
        with pytest.raises(
            UserError, match=r"a call that packed train .* was stopped here; expected its end"
        ):
            pack(records, tmp_path, sources=[], options=options)
    pack(train, tmp_path, sources=[], options=SMALL)
    pack(val, tmp_path, sources=[], options=SMALL)
    assert verify(tmp_path).problems == []


def test_a_killed_worker_is_reported_and_the_same_call_resumes(synthetic_coco: Path, tmp_path: Path) -> None:
    def kill(_: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    train = records_of(synthetic_coco, "train")
    options = PackOptions(images_per_shard=2, workers=2)
    with pytest.raises(
        UserError, match=r"a worker process was killed or could not start, .* run the same command again"
    ):
        pack(train, tmp_path, sources=[], options=options, progress=kill)
    assert list(tmp_path.glob(".packing/*.json"))
    pack(train, tmp_path, sources=[], options=options)
    assert verify(tmp_path).problems == []
