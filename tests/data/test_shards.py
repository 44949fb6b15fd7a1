import hashlib
import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.lib.recfunctions
import pytest
import xxhash

from captionscale.data import manifest
from captionscale.data.manifest import MANIFEST
from captionscale.data.shards import Split, find_image
from captionscale.data.sources import coco
from captionscale.errors import UserError

SPLITS = ("train", "val", "test")


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Shards of one's own, to damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


# ---- reading


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_holds_the_images_and_captions_of_the_data_set(
    synthetic_coco: Path, packed: Path, name: str
) -> None:
    captions = synthetic_coco / "annotations" / f"captions_{name}2017.json"
    records = coco.read_official(synthetic_coco / f"{name}2017", captions, name)
    split = Split(packed, name)
    assert len(split) == len(records)
    assert split.index["image_id"].tolist() == [record.image_id for record in records]
    for item, record in enumerate(records):
        assert split.image(item) == record.read()
        assert split.captions(item) == record.captions
        assert split.sample(item).file == record.name
    assert split.references() == coco.read_references(captions)


def test_shard_sizes_number_the_items_through(packed: Path) -> None:
    split = Split(packed, "train")
    assert split.shard_sizes.tolist() == [16, 16, 16]
    assert split.index["shard"].tolist() == [0] * 16 + [1] * 16 + [2] * 16


def test_reads_from_many_threads_are_those_of_one(packed: Path) -> None:
    split = Split(packed, "train")
    alone = [Split(packed, "train").image(item) for item in range(len(split))]
    items = np.random.default_rng(0).integers(len(split), size=2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(split.image, items))
    assert together == [alone[item] for item in items]


def test_an_image_is_found_by_its_id_in_any_split(packed: Path) -> None:
    for name in SPLITS:
        for item, image_id in enumerate(Split(packed, name).index["image_id"].tolist()):
            split, found = find_image(packed, image_id)
            assert (split.name, found) == (name, item)
    with pytest.raises(UserError, match="no image 99999 in any split"):
        find_image(packed, 99999)


def test_the_hash_of_a_split_is_that_of_its_content(packed: Path, copy: Path) -> None:
    assert Split(packed, "train").sha256 == Split(copy, "train").sha256
    assert len({Split(packed, name).sha256 for name in SPLITS}) == 3


# ---- what is refused on opening


def test_an_unknown_split_is_refused_with_the_nearest(packed: Path) -> None:
    with pytest.raises(UserError, match="no split 'tran'; did you mean 'train'"):
        Split(packed, "tran")


def test_a_folder_without_a_manifest_is_not_complete(copy: Path, tmp_path: Path) -> None:
    (copy / MANIFEST).unlink()
    for folder in (copy, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{folder}: no {MANIFEST}, so no finished shards"):
            Split(folder, "train")


@pytest.mark.parametrize("content", ["", "[]", "{}", "{'format': 1}", '{"format": 1, "spl', "\xff", "1"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=f"{MANIFEST}: not a manifest .* remove the folder and pack again"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('"name": "train-00001.tar"', "shard train-00001.tar: Object missing required field `name`"),
        ('"size_bytes": ', "shard train-00000.tar: Object missing required field `size_bytes`"),
        ('"blake3": ', "shard train-00000.tar: Object missing required field `blake3`"),
        ('"captions": ', "Object missing required field `captions`"),
        ('"index_sha256": ', "Object missing required field `index_sha256`"),
        ('"format": ', "no key 'format'"),
        ("{", "Extra data"),
    ],
)
def test_a_manifest_that_lost_a_line_is_refused_with_its_key(copy: Path, line: str, expected: str) -> None:
    lines = (copy / MANIFEST).read_text().splitlines()
    at = next(k for k, text in enumerate(lines) if line in text)
    (copy / MANIFEST).write_text("\n".join(lines[:at] + lines[at + 1 :]))
    with pytest.raises(UserError, match=f"{MANIFEST}: not a manifest .*{expected}.*; copy it again from"):
        Split(copy, "train")


def test_a_manifest_that_lost_a_shard_is_refused_with_its_name(copy: Path) -> None:
    document = json.loads((copy / MANIFEST).read_text())
    train = document["splits"]["train"]
    train["shards"].pop()
    (copy / MANIFEST).write_text(json.dumps(document))
    expected = r"train\.index\.npy: names train-00002\.tar, but the manifest has 2 shards"
    with pytest.raises(UserError, match=expected):
        Split(copy, "train")


def test_another_format_is_refused_with_both_numbers(copy: Path) -> None:
    rewrite(copy / MANIFEST, lambda data: data.replace(b'"format": 2', b'"format": 1'))
    with pytest.raises(UserError, match="format 1, expected 2; pack again, into another folder"):
        Split(copy, "train")
    rewrite(copy / MANIFEST, lambda data: data.replace(b'"format": 1', b'"format": 3'))
    with pytest.raises(UserError, match="format 3, expected 2; upgrade captionscale"):
        Split(copy, "train")


def test_a_missing_or_truncated_shard_is_refused(copy: Path) -> None:
    shard = copy / "train-00001.tar"
    size = shard.stat().st_size
    for change in (lambda data: data[:-1], lambda _: b"", lambda data: data + b"\0"):
        whole = shard.read_bytes()
        rewrite(shard, change)
        expected = rf"train-00001\.tar: {len(change(whole)):,} bytes, manifest says {size:,} bytes"
        with pytest.raises(UserError, match=expected):
            Split(copy, "train")
        shard.write_bytes(whole)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar: missing, manifest says"):
        Split(copy, "train")
    assert len(Split(copy, "val")) == 8


def test_a_damaged_index_is_refused_before_it_pairs_images_with_other_captions(copy: Path) -> None:
    path = copy / "val.index.npy"
    whole = path.read_bytes()
    index = np.load(path)
    index["image_offset"][0] = index["image_offset"][1]
    np.save(path, index)
    with pytest.raises(
        UserError, match=r"val\.index\.npy: sha256 differs from the manifest's; copy it again"
    ):
        Split(copy, "val")
    path.write_bytes(whole)
    assert len(Split(copy, "val")) == 8
    path.unlink()
    with pytest.raises(UserError, match=r"val\.index\.npy: No such file or directory, expected the split's"):
        Split(copy, "val")


def test_an_index_of_other_rows_is_refused_though_the_manifest_knows_it(copy: Path) -> None:
    path = copy / "val.index.npy"
    for content, expected in (
        (b"", r"not an index .* remove the folder and pack again"),
        (b"PK\3\4" + path.read_bytes(), "not an index"),
        (_saved(np.zeros(8)), "columns"),
        ((copy / "train.index.npy").read_bytes(), "48 images, manifest says 8"),
    ):
        path.write_bytes(content)
        document = json.loads((copy / MANIFEST).read_text())
        document["splits"]["val"]["index_sha256"] = hashlib.sha256(content).hexdigest()
        (copy / MANIFEST).write_text(json.dumps(document))
        with pytest.raises(UserError, match=rf"val\.index\.npy: {expected}"):
            Split(copy, "val")


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "val-00000.tar", "train-00001.tar "])
def test_a_manifest_that_names_other_files_is_refused(copy: Path, name: str) -> None:
    document = json.loads((copy / MANIFEST).read_text())
    document["splits"]["train"]["shards"][1]["name"] = name
    (copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"not a manifest \(shard train-00001\.tar is called"):
        Split(copy, "val")


def test_a_shard_that_shrinks_while_it_is_open_is_named_with_the_byte(copy: Path) -> None:
    split = Split(copy, "val")
    row = split.index[5]
    start, size = int(row["image_offset"]), int(row["image_size"])
    rewrite(copy / "val-00000.tar", lambda data: data[: start + 7])
    expected = (
        rf"val-00000\.tar: image {row['image_id']}: image at byte {start:,} ends after 7 of {size:,} bytes"
    )
    with pytest.raises(UserError, match=expected):
        split.image(5)


def test_facts_that_are_no_json_are_named_with_the_byte(copy: Path) -> None:
    # With a fitting hash: a packer that wrote them so.
    row = Split(copy, "val").index[2]
    start, size = int(row["json_offset"]), int(row["json_size"])
    rewrite(copy / "val-00000.tar", lambda data: data[:start] + b"?" * size + data[start + size :])
    index = np.load(copy / "val.index.npy")
    index["json_hash"][2] = xxhash.xxh3_64_intdigest(b"?" * size)
    np.save(copy / "val.index.npy", index)
    facts = json.loads((copy / MANIFEST).read_text())
    facts["splits"]["val"]["index_sha256"] = hashlib.sha256((copy / "val.index.npy").read_bytes()).hexdigest()
    (copy / MANIFEST).write_text(json.dumps(facts))
    with pytest.raises(UserError, match=rf"val-00000\.tar: .*json at byte {start:,} holds no sample"):
        Split(copy, "val").captions(2)


def test_an_index_without_hashes_is_refused(copy: Path) -> None:
    index = np.load(copy / "val.index.npy")
    names = [name for name in index.dtype.names if not name.endswith("_hash")]
    np.save(copy / "val.index.npy", np.lib.recfunctions.repack_fields(index[names]))
    facts = json.loads((copy / MANIFEST).read_text())
    facts["splits"]["val"]["index_sha256"] = hashlib.sha256((copy / "val.index.npy").read_bytes()).hexdigest()
    (copy / MANIFEST).write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"columns .*, expected .*'image_hash', 'json_hash'"):
        Split(copy, "val")
