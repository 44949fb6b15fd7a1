import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from captionscale.data.manifest import MANIFEST
from captionscale.data.packing import PackOptions, pack
from captionscale.data.shard_writer import REJECTED
from captionscale.data.shards import Split
from captionscale.data.sources import coco
from captionscale.data.sources.record import Record
from captionscale.data.verification import verify
from captionscale.errors import UserError


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Shards of one's own, to damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def records_of(synthetic_coco: Path, split: str) -> list[Record]:
    captions = synthetic_coco / "annotations" / f"captions_{split}2017.json"
    return coco.read_official(synthetic_coco / f"{split}2017", captions, split)


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def place(folder: Path, split: str, item: int, part: str) -> slice:
    """Return where a part of a sample is in its tar."""
    row = Split(folder, split).index[item]
    return slice(int(row[f"{part}_offset"]), int(row[f"{part}_offset"] + row[f"{part}_size"]))


def forge(folder: Path, split: str, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Make the manifest say what the files are now: an attacker's, or a careless script's, work."""
    manifest = json.loads((folder / MANIFEST).read_text())
    facts = manifest["splits"][split]
    for shard in facts["shards"]:
        data = (folder / shard["name"]).read_bytes()
        shard["blake3"], shard["size_bytes"] = blake3(data).hexdigest(), len(data)
    facts["index_sha256"] = hashlib.sha256((folder / f"{split}.index.npy").read_bytes()).hexdigest()
    change(facts)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("workers", [1, 4])
def test_good_shards_have_no_problems_and_no_notes(packed: Path, workers: int) -> None:
    seen: list[int] = []
    found = verify(packed, deep=True, workers=workers, progress=seen.append)
    assert (found.problems, found.notes) == ([], [])
    assert sum(seen) == 64


@pytest.mark.parametrize("part", ["image", "json"])
def test_a_flipped_byte_names_shard_image_place_and_cure(copy: Path, part: str) -> None:
    random = np.random.default_rng(0)
    for item in (0, 16, 47):
        where = place(copy, "train", item, part)
        image_id = Split(copy, "train").index[item]["image_id"]
        path = copy / f"train-{item // 16:05d}.tar"
        for byte in (where.start, where.stop - 1, int(random.integers(where.start, where.stop))):
            flip(path, byte)
            (problem,) = verify(copy).problems
            thing = "the bytes at" if part == "image" else "the captions at byte"
            assert problem.startswith(
                f"{path}: image {image_id}: {thing} {where.start:,} are not those packed; "
            )
            assert "copy it again from an intact source, or remove the folder and pack again" in problem
            flip(path, byte)
    assert verify(copy).problems == []


def test_a_flipped_byte_anywhere_else_is_found_and_its_file_named(copy: Path) -> None:
    path = copy / "val-00000.tar"
    size = path.stat().st_size
    for byte in (0, 130, size - 1, place(copy, "val", 3, "json").stop):
        flip(path, byte)
        (problem,) = verify(copy).problems
        assert problem.startswith(f"{path}: blake3 ")
        assert "a tar header, or the manifest, is damaged" in problem
        flip(path, byte)
    path = copy / "val.index.npy"
    for byte in (0, 60, path.stat().st_size - 1):
        flip(path, byte)
        (problem,) = verify(copy).problems
        assert problem.startswith(f"{path}: ")
        flip(path, byte)


def test_two_images_that_were_swapped_are_named_each_with_the_other(copy: Path) -> None:
    split = Split(copy, "train")
    path, size = copy / "train-00000.tar", [len(split.image(item)) for item in range(16)]
    small, large = sorted((2, 9), key=lambda item: size[item])
    data, index = bytearray(path.read_bytes()), np.load(copy / "train.index.npy")
    # Swapped with the size in the index corrected, as a careless script would.
    start = place(copy, "train", large, "image").start
    data[start : start + size[small]] = split.image(small)
    data[place(copy, "train", small, "image")] = split.image(large)[: size[small]]
    index["image_size"][large] = size[small]
    path.write_bytes(data)
    np.save(copy / "train.index.npy", index)
    forge(copy, "train")
    ids = split.index["image_id"]
    problems = verify(copy).problems
    assert len(problems) == 2
    assert any(
        f"image {ids[large]}: the bytes at" in it and f"are those of image {ids[small]};" in it
        for it in problems
    )
    assert any(f"image {ids[small]}: the bytes at" in it and "are not those packed;" in it for it in problems)


def test_two_samples_whose_rows_were_swapped_are_named(copy: Path) -> None:
    index = np.load(copy / "train.index.npy")
    ids = index["image_id"][[4, 5]].tolist()
    for column in ("image_offset", "image_size", "image_hash", "width", "height"):
        index[column][[4, 5]] = index[column][[5, 4]]
    np.save(copy / "train.index.npy", index)
    forge(copy, "train")
    (problem,) = verify(copy).problems
    assert problem.startswith(f"{copy / 'train-00000.tar'}: image {ids[0]}: the index differs from the tar")


def test_a_cut_tar_is_named_with_both_sizes(copy: Path) -> None:
    path = copy / "train-00001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-600])
    (problem,) = verify(copy).problems
    assert problem.startswith(
        f"{path}: {size - 600:,} bytes, manifest says {size:,} bytes; copy it again from"
    )


def test_a_cut_tar_that_its_manifest_agrees_with_names_the_images_that_are_gone(copy: Path) -> None:
    path = copy / "train-00001.tar"
    start = place(copy, "train", 30, "image").start
    path.write_bytes(path.read_bytes()[: start + 7])
    forge(copy, "train")
    ids = np.load(copy / "train.index.npy")["image_id"][[30, 31]]
    (problem,) = verify(copy).problems
    assert f"bytes at byte {start}, expected it within train-00001.tar; 2 such rows" in problem
    assert f"of images {ids[0]}, {ids[1]};" in problem


def test_a_manifest_that_lost_a_shard_names_it(copy: Path) -> None:
    forge(copy, "train", lambda facts: facts["shards"].pop())
    named = verify(copy).problems
    assert named[0].startswith(f"{copy / 'train-00002.tar'}: the manifest does not name it")
    assert "names train-00002.tar, but the manifest has 2 shards" in named[1]


def test_a_duplicated_id_is_named(copy: Path) -> None:
    index = np.load(copy / "train.index.npy")
    index["image_id"][5] = index["image_id"][4]
    np.save(copy / "train.index.npy", index)
    forge(copy, "train")
    (problem,) = verify(copy).problems
    again = f"image {index['image_id'][4]} is there again"
    assert problem.startswith(f"{copy / 'train.index.npy'}: {again}")


@pytest.mark.parametrize("column", ["image_id", "captions", "width"])
def test_an_index_that_differs_from_its_samples_is_found(copy: Path, column: str) -> None:
    index = np.load(copy / "train.index.npy")
    index[column][20] += 1000
    np.save(copy / "train.index.npy", index)
    forge(copy, "train", lambda facts: facts.update(captions=int(index["captions"].sum())))
    (problem,) = verify(copy, deep=True).problems
    assert problem.startswith(f"{copy / 'train-00001.tar'}: image {index['image_id'][20]}: ")


def test_numbers_that_the_manifest_has_wrong_are_found(copy: Path) -> None:
    forge(copy, "train", lambda facts: facts.update(captions=facts["captions"] + 1))
    forge(copy, "val", lambda facts: facts.update(rejected=1))
    found = verify(copy).problems
    assert [Path(problem.split(": ")[0]).name for problem in found] == [REJECTED, "train.index.npy"]
    assert "0 images of split 'val', manifest says 1" in found[0]


def test_all_damage_is_reported_at_once(copy: Path) -> None:
    flip(copy / "train-00000.tar", place(copy, "train", 0, "image").start)
    flip(copy / "train-00002.tar", place(copy, "train", 40, "image").start)
    (copy / "test-00000.tar").unlink()
    (copy / "train-00001.tar").unlink()
    shutil.copy(copy / "val-00000.tar", copy / "stray.tar")
    named = [Path(problem.split(":")[0]).name for problem in verify(copy, workers=3).problems]
    trains = [f"train-{number:05d}.tar" for number in range(3)]
    assert named == ["stray.tar", *trains, "test-00000.tar"]


def test_an_image_of_two_splits_is_a_leak_even_under_another_id(synthetic_coco: Path, tmp_path: Path) -> None:
    train = records_of(synthetic_coco, "train")
    pack(train, tmp_path, sources=[], options=PackOptions(images_per_shard=16))
    leak = replace(train[7], image_id=999_999, split="test")
    pack(
        [*records_of(synthetic_coco, "test"), leak],
        tmp_path,
        sources=[],
        options=PackOptions(images_per_shard=16),
    )
    problem, verdict = verify(tmp_path).problems
    assert verdict.startswith("1 images are in two splits, so training may see scored images")
    pair = f"image {train[7].image_id} of split 'train' and image 999999 of split 'test' are the same bytes"
    assert problem == pair
    allowed = verify(tmp_path, allow_leaks=True)
    assert allowed.problems == []
    assert allowed.notes == [pair]


def test_an_image_twice_in_one_split_is_a_note(synthetic_coco: Path, tmp_path: Path) -> None:
    val = records_of(synthetic_coco, "val")
    pack([*val, replace(val[2], image_id=999_999)], tmp_path, sources=[])
    found = verify(tmp_path)
    assert found.problems == []
    assert found.notes == [
        f"image {val[2].image_id} of split 'val' and image 999999 of split 'val' are the same bytes"
    ]


def test_an_unfinished_pack_next_to_a_split_is_to_be_finished(synthetic_coco: Path, tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    pack(records_of(synthetic_coco, "val"), tmp_path, sources=[])
    with pytest.raises(KeyboardInterrupt):
        pack(records_of(synthetic_coco, "train"), tmp_path, sources=[], progress=stop)
    (problem,) = verify(tmp_path).problems
    assert "train-00000.tar: the manifest does not name it; finish that pack, or" in problem


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished shards"):
        verify(tmp_path)
