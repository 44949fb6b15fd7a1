"""Read packed splits: WebDataset tars with an index, read by offset. `shards/README.md` has the format."""

import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np
import xxhash
from jaxtyping import Int, Shaped

from captionscale import parsing
from captionscale.data import index
from captionscale.data.manifest import CURE
from captionscale.data.storage import Storage, as_storage, read_manifest
from captionscale.errors import UserError, did_you_mean


class Sample(msgspec.Struct, frozen=True):
    """The JSON stored with an image: its id and file name in the data set, and its raw captions."""

    image_id: int
    file: str
    captions: tuple[str, ...]


_SAMPLE = msgspec.json.Decoder(Sample)


class Split:
    """A split, open for reading; an `item` is a row of its index.

    Data is checked against its hash in the index, and the index against its hash in the manifest. Reads are
    thread-safe.
    """

    def __init__(self, where: Storage | Path, name: str, *, check_sizes: bool = True):
        """Open a split of the output of `captionscale pack`.

        Raises:
            UserError: The split is missing, its index is damaged, or a shard is missing or of another size.
        """
        self.storage, self.name = as_storage(where), name
        splits = read_manifest(self.storage).splits
        if name not in splits:
            raise UserError(f"{where}: no split '{name}'; {did_you_mean(name, splits)}")
        self.info = splits[name]
        for shard in self.info.shards if check_sizes else ():
            self.storage.check_size(shard)
        self.index: Shaped[np.ndarray, "sample"] = index.read(self.storage, name, self.info)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sha256(self) -> str:
        """Hash of the index and of all shards."""
        facts = json.dumps([self.info.index_sha256, [shard.blake3 for shard in self.info.shards]])
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def shard_sizes(self) -> Int[np.ndarray, "shard"]:
        """Number of samples in each shard."""
        return np.bincount(self.index["shard"], minlength=len(self.info.shards))

    def image(self, item: int) -> bytes:
        """Return the stored bytes of an image; refuse bytes that changed after packing."""
        return self._read(item, "image")

    def captions(self, item: int) -> tuple[str, ...]:
        """Return an image's raw captions."""
        return self.sample(item).captions

    def sample(self, item: int) -> "Sample":
        """Return the JSON stored with an image; errors as in `image`."""
        try:
            return parsing.decode(self._read(item, "json"), _SAMPLE)
        except ValueError as error:
            place = f"{self.place(item)}: json at byte {int(self.index[item]['json_offset']):,}"
            raise UserError(f"{place} holds no sample ({error}); {CURE}") from None

    def require_captions(self, purpose: str) -> None:
        """Check that every image has captions; `purpose` ends the error: what for, and the cure."""
        if missing := int((self.index["captions"] == 0).sum()):
            raise UserError(
                f"{self.storage}: {missing:,} of {len(self):,} images of split '{self.name}' have no"
                f" captions; expected them {purpose}"
            )

    def place(self, item: int) -> str:
        """Return shard and id of an image, for errors."""
        row = self.index[item]
        return f"{self.storage}/{self.info.shards[int(row['shard'])].name}: image {row['image_id']}"

    def references(self) -> dict[int, list[str]]:
        """Return the captions of all images by image id."""
        return {int(row["image_id"]): list(self.captions(item)) for item, row in enumerate(self.index)}

    def _read(self, item: int, part: str) -> bytes:
        row = self.index[item]
        shard, offset, size = int(row["shard"]), int(row[f"{part}_offset"]), int(row[f"{part}_size"])
        data = self.storage.pread(self.info.shards[shard], offset, size)
        if len(data) != size:
            raise UserError(
                f"{self.place(item)}: {part} at byte {offset:,} ends after {len(data):,} of {size:,} bytes;"
                f" {CURE}"
            )
        # A changed caption would otherwise go unnoticed.
        found, expected = xxhash.xxh3_64_intdigest(data), int(row[f"{part}_hash"])
        if found != expected:
            matches = self.index["image_id"][self.index[f"{part}_hash"] == found]
            what = "bytes at" if part == "image" else "captions at byte"
            whose = f"those of image {matches[0]}" if len(matches) else "not those packed"
            raise UserError(
                f"{self.place(item)}: the {what} {offset:,} are {whose}; found xxh3 {found:016x}, expected"
                f" {expected:016x}; {CURE}"
            )
        return data


def find_image(where: Storage | Path, image_id: int) -> tuple[Split, int]:
    """Return the split and the item of an image; refuse an id that no split has."""
    place = as_storage(where)
    for name in read_manifest(place).splits:
        split = Split(place, name)
        items = np.flatnonzero(split.index["image_id"] == image_id)
        if len(items):
            return split, int(items[0])
    raise UserError(f"{place}: no image {image_id} in any split; ids are those of the data set")
