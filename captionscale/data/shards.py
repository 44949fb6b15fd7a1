"""Packed splits: plain WebDataset tars beside an index, read by offset.

A folder holds `train-00000.tar ...`, `train.index.npy` and, written last, `manifest.json`: a folder without
a manifest is not complete. The format is described in `shards/README.md`.
"""

import hashlib
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from captionscale.errors import UserError, did_you_mean
from captionscale.files import sha256_of

FORMAT = 1
MANIFEST = "manifest.json"
_CURE = "copy it again from where it is whole, or remove the folder and pack again"
INDEX_ROW = np.dtype(
    [
        ("shard", "<i8"),
        ("image_offset", "<i8"),
        ("image_size", "<i8"),
        ("json_offset", "<i8"),
        ("json_size", "<i8"),
        ("image_id", "<i8"),
        ("captions", "<i8"),
    ]
)


def index_name(split: str) -> str:
    """Return the file name of a split's index."""
    return f"{split}.index.npy"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what a packed folder says of itself.

    Raises:
        UserError: No manifest, a damaged one, or one of another format.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, _ = manifest["format"], manifest["splits"]
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no {MANIFEST}, so no finished shards; run captionscale pack first, or correct"
            " the path (a relative one starts at the folder you are in)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest ({error}); {_CURE}") from None
    if found != FORMAT:
        raise UserError(
            f"{path}: format {found}, wanted {FORMAT}; pack again with this version of captionscale"
        )
    return manifest


class Split:
    """An opened split; an `item` is a row of its index.

    Safe to read from many threads: reads carry their own position.
    """

    def __init__(self, folder: Path, name: str):
        """Open a split and compare the sizes of its files with the manifest.

        Args:
            folder: What `captionscale pack` wrote.
            name: Such as `train`.

        Raises:
            UserError: No such split, an empty one, or a shard that is missing or of the wrong size.
        """
        manifest = read_manifest(folder)
        if name not in manifest["splits"]:
            raise UserError(f"{folder}: no split '{name}'; {did_you_mean(name, manifest['splits'])}")
        self.folder = folder
        self.name = name
        self.facts: dict[str, Any] = manifest["splits"][name]
        self.paths = [folder / shard["name"] for shard in self.facts["shards"]]
        for path, shard in zip(self.paths, self.facts["shards"], strict=True):
            size_bytes = path.stat().st_size if path.is_file() else None
            if size_bytes != shard["size_bytes"]:
                raise UserError(
                    f"{path}: {'missing' if size_bytes is None else f'{size_bytes:,} bytes'}, manifest says"
                    f" {shard['size_bytes']:,} bytes; {_CURE}"
                )
        self.index: Shaped[np.ndarray, "sample"] = _read_index(folder / index_name(name))
        if len(self.index) == 0 or len(self.index) != self.facts["images"]:
            raise UserError(
                f"{folder / index_name(name)}: {len(self.index):,} images, manifest says"
                f" {self.facts['images']:,}; wanted at least one and the same number; {_CURE}"
            )
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sha256(self) -> str:
        """Hash of the index and so of which sample is where; the manifest holds those of the bytes."""
        facts = json.dumps([self.facts["index_sha256"], [s["sha256"] for s in self.facts["shards"]]])
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def shard_sizes(self) -> Int[np.ndarray, "shard"]:
        """Number of samples in each shard."""
        return np.bincount(self.index["shard"], minlength=len(self.paths))

    def image(self, item: int) -> bytes:
        """Return the stored bytes of an image.

        Raises:
            UserError: The shard ends before them.
        """
        return self._read(item, "image")

    def captions(self, item: int) -> list[str]:
        """Return an image's captions, as the data set gives them."""
        captions: list[str] = self.sample_facts(item)["captions"]
        return captions

    def sample_facts(self, item: int) -> dict[str, Any]:
        """Return what is stored beside an image: `image_id`, `file`, `captions`."""
        raw = self._read(item, "json")
        try:
            facts: dict[str, Any] = json.loads(raw)
        except ValueError:
            raise UserError(f"{self._place(item, 'json')} holds no JSON; {_CURE}") from None
        return facts

    def references(self) -> dict[int, list[str]]:
        """Return the captions of all images by image id."""
        return {int(row["image_id"]): self.captions(item) for item, row in enumerate(self.index)}

    def _read(self, item: int, part: str) -> bytes:
        row = self.index[item]
        shard, offset, size = int(row["shard"]), int(row[f"{part}_offset"]), int(row[f"{part}_size"])
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY)
        data = os.pread(self._descriptors[shard], size, offset)
        if len(data) != size:
            raise UserError(f"{self._place(item, part)} ends after {len(data):,} of {size:,} bytes; {_CURE}")
        return data

    def _place(self, item: int, part: str) -> str:
        row = self.index[item]
        name = self.paths[int(row["shard"])].name
        return f"{name}: image {row['image_id']}: {part} at byte {int(row[f'{part}_offset']):,}"

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


def find(folder: Path, image_id: int) -> tuple[Split, int]:
    """Return the split and the item of an image.

    Raises:
        UserError: No split holds it.
    """
    for name in read_manifest(folder)["splits"]:
        split = Split(folder, name)
        items = np.flatnonzero(split.index["image_id"] == image_id)
        if len(items):
            return split, int(items[0])
    raise UserError(f"{folder}: no image {image_id} in any split; ids are those of the data set")


def verify(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a packed folder; nothing, if it is what was packed.

    Compares each file with its checksum, the index with the tars' own directories, and both with what
    each sample says of itself.
    """
    splits = read_manifest(folder)["splits"]
    known = {shard["name"] for facts in splits.values() for shard in facts["shards"]}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield f"{path}: the manifest does not name it; remove it, or remove the folder and pack again"
    for name in splits:
        try:
            split = Split(folder, name)
        except UserError as error:
            yield str(error)
            continue
        index_path = folder / index_name(name)
        if sha256_of(index_path) != split.facts["index_sha256"]:
            yield f"{index_path}: sha256 differs from the manifest's; {_CURE}"
            continue
        for number, (path, shard) in enumerate(zip(split.paths, split.facts["shards"], strict=True)):
            found = sha256_of(path)
            if found != shard["sha256"]:
                yield (f"{path}: sha256 {found[:12]}..., manifest says {shard['sha256'][:12]}...; {_CURE}")
                continue
            items = np.flatnonzero(split.index["shard"] == number)
            if not np.array_equal(split.index[items], index_shard(path, number)):
                yield f"{path}: the index does not say what the tar holds; {_CURE}"
        if int(split.index["captions"].sum()) != split.facts["captions"]:
            yield f"{index_path}: number of captions differs from the manifest's; {_CURE}"


def index_shard(path: Path, number: int) -> Shaped[np.ndarray, "sample"]:
    """Return the index rows of one tar, from the tar itself.

    Args:
        path: A tar with one image and one .json for each sample, side by side.
        number: What goes into the column `shard`.
    """
    rows = []
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        for pair in zip(members[::2], members[1::2], strict=True):
            # A TarWriter sorts by name, so .json stands after .jpg and before .png.
            facts, image = sorted(pair, key=lambda member: not member.name.endswith(".json"))
            extracted = tar.extractfile(facts)
            assert extracted is not None
            sample = json.load(extracted)
            rows.append(
                (
                    number,
                    image.offset_data,
                    image.size,
                    facts.offset_data,
                    facts.size,
                    sample["image_id"],
                    len(sample["captions"]),
                )
            )
    return np.array(rows, dtype=INDEX_ROW)


def _read_index(path: Path) -> Shaped[np.ndarray, "sample"]:
    try:
        with path.open("rb") as file:
            index: Shaped[np.ndarray, "sample"] = np.lib.format.read_array(file, allow_pickle=False)
    # NumPy lets out what its parsers raise on a damaged header: SyntaxError, TokenError and others.
    except Exception as error:
        raise UserError(f"{path}: not an index ({error}); {_CURE}") from None
    if index.dtype != INDEX_ROW:
        raise UserError(f"{path}: columns {index.dtype.names}, wanted {INDEX_ROW.names}; {_CURE}")
    return index
