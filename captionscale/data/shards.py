"""Packed splits: plain WebDataset tars beside an index, read by offset.

A folder holds `train-00000.tar ...`, `train.index.npy` and, written last, `manifest.json`: a folder without
a manifest is not complete. The format is described in `shards/README.md`.
"""

import hashlib
import io
import json
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Int, Shaped

from captionscale.data import manifest
from captionscale.data.manifest import CURE, MAX_INDEX_BYTES, SplitFacts, shard_name
from captionscale.data.places import Place, as_place, manifest_of
from captionscale.errors import UserError, did_you_mean

INDEX_ROW = np.dtype(
    [
        ("shard", "<i8"),
        ("image_offset", "<i8"),
        ("image_size", "<i8"),
        ("json_offset", "<i8"),
        ("json_size", "<i8"),
        ("image_id", "<i8"),
        ("captions", "<i8"),
        ("width", "<i8"),
        ("height", "<i8"),
        ("image_hash", "<u8"),
        ("json_hash", "<u8"),
    ]
)
_MAX_HEADER_BYTES = 4096
"""NumPy's own: a tenth of it is used."""


def index_name(split: str) -> str:
    """Return the file name of a split's index."""
    return f"{split}.index.npy"


class Sample(msgspec.Struct, frozen=True):
    """What is stored beside an image.

    Attributes:
        image_id: The data set's own number of the image.
        file: Its file name in the data set.
        captions: As the data set gives them; none if it has none.
    """

    image_id: int
    file: str
    captions: tuple[str, ...]


class Split:
    """An opened split; an `item` is a row of its index.

    Safe to read from many threads: reads carry their own position.
    """

    def __init__(self, where: Place | Path, name: str, *, check: bool = True):
        """Open a split and compare its index and the sizes of its shards with the manifest.

        Args:
            where: What `captionscale pack` wrote.
            name: Such as `train`.
            check: Whether the shards' sizes are compared.

        Raises:
            UserError: No such split, an empty one, a damaged index, or a shard that is missing or of the
                wrong size.
        """
        place = as_place(where)
        splits = manifest_of(place).splits
        if name not in splits:
            raise UserError(f"{place}: no split '{name}'; {did_you_mean(name, splits)}")
        self.place = place
        self.name = name
        self.facts = splits[name]
        for shard in self.facts.shards if check else ():
            place.check(shard)
        self.index: Shaped[np.ndarray, "sample"] = _read_index(place, name, self.facts)
        if len(self.index) == 0 or len(self.index) != self.facts.images:
            raise UserError(
                f"{place}/{index_name(name)}: {len(self.index):,} images, manifest says"
                f" {self.facts.images:,}; wanted at least one and the same number; {CURE}"
            )
        last = int(self.index["shard"].max())
        if last >= len(self.facts.shards):
            raise UserError(
                f"{place}/{manifest.MANIFEST}: split '{name}' has {len(self.facts.shards):,} shards, but its"
                f" index speaks of {shard_name(name, last)}; {CURE}"
            )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sha256(self) -> str:
        """Hash of the index and so of which sample is where; the manifest holds those of the bytes."""
        facts = json.dumps([self.facts.index_sha256, [shard.blake3 for shard in self.facts.shards]])
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def shard_sizes(self) -> Int[np.ndarray, "shard"]:
        """Number of samples in each shard."""
        return np.bincount(self.index["shard"], minlength=len(self.facts.shards))

    def image(self, item: int) -> bytes:
        """Return the stored bytes of an image.

        Raises:
            UserError: The shard ends before them.
        """
        return self._read(item, "image")

    def text(self, item: int) -> bytes:
        """Return the stored bytes of what is beside an image.

        Raises:
            UserError: The shard ends before them.
        """
        return self._read(item, "json")

    def captions(self, item: int) -> tuple[str, ...]:
        """Return an image's captions, as the data set gives them."""
        return self.sample(item).captions

    def sample(self, item: int) -> "Sample":
        """Return what is stored beside an image.

        Raises:
            UserError: It is damaged.
        """
        try:
            return msgspec.json.decode(self.text(item), type=Sample)
        except msgspec.DecodeError as error:
            raise UserError(f"{self._place(item, 'json')} holds no sample ({error}); {CURE}") from None

    def need_captions(self, purpose: str) -> None:
        """Refuse a split of which an image has no captions.

        Args:
            purpose: What they are needed for, and what else to do, for the error.

        Raises:
            UserError: There is such an image.
        """
        if missing := int((self.index["captions"] == 0).sum()):
            raise UserError(
                f"{self.place}: {missing:,} of {len(self):,} images of split '{self.name}' have no captions;"
                f" wanted them {purpose}"
            )

    def references(self) -> dict[int, list[str]]:
        """Return the captions of all images by image id."""
        return {int(row["image_id"]): list(self.captions(item)) for item, row in enumerate(self.index)}

    def _read(self, item: int, part: str) -> bytes:
        row = self.index[item]
        shard, offset, size = int(row["shard"]), int(row[f"{part}_offset"]), int(row[f"{part}_size"])
        data = self.place.pread(self.facts.shards[shard], offset, size)
        if len(data) != size:
            raise UserError(f"{self._place(item, part)} ends after {len(data):,} of {size:,} bytes; {CURE}")
        return data

    def _place(self, item: int, part: str) -> str:
        row = self.index[item]
        name = self.facts.shards[int(row["shard"])].name
        return f"{name}: image {row['image_id']}: {part} at byte {int(row[f'{part}_offset']):,}"


def find(where: Place | Path, image_id: int) -> tuple[Split, int]:
    """Return the split and the item of an image.

    Raises:
        UserError: No split holds it.
    """
    place = as_place(where)
    for name in manifest_of(place).splits:
        split = Split(place, name)
        items = np.flatnonzero(split.index["image_id"] == image_id)
        if len(items):
            return split, int(items[0])
    raise UserError(f"{place}: no image {image_id} in any split; ids are those of the data set")


def _read_index(place: Place, split: str, facts: SplitFacts) -> Shaped[np.ndarray, "sample"]:
    path = f"{place}/{index_name(split)}"
    try:
        # The manifest says how many rows it has.
        expected_bytes = facts.images * INDEX_ROW.itemsize + _MAX_HEADER_BYTES
        data = place.fetch(index_name(split), min(expected_bytes, MAX_INDEX_BYTES))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, wanted the split's index; {CURE}") from None
    # It pairs images with captions: a damaged one would do so wrongly without a word.
    if hashlib.sha256(data).hexdigest() != facts.index_sha256:
        raise UserError(f"{path}: sha256 differs from the manifest's; {CURE}")
    try:
        index: Shaped[np.ndarray, "sample"] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    # NumPy lets out what its parsers raise on a damaged header: SyntaxError, TokenError and others.
    except Exception as error:
        raise UserError(f"{path}: not an index ({error}); {CURE}") from None
    if index.dtype != INDEX_ROW:
        raise UserError(f"{path}: columns {index.dtype.names}, wanted {INDEX_ROW.names}; {CURE}")
    return index
