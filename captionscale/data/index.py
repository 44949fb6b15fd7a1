"""The index of a split: a row per sample with its location, validated when read."""

import hashlib
import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Shaped

from captionscale.data.manifest import CURE, MAX_INDEX_BYTES, SplitInfo, index_name, shard_name
from captionscale.data.storage import Storage
from captionscale.errors import UserError

_COLUMNS = "shard image_offset image_size json_offset json_size image_id captions width height"
_HASHES = "image_hash json_hash"
INDEX_DTYPE = np.dtype(
    [(name, "<i8") for name in _COLUMNS.split()] + [(name, "<u8") for name in _HASHES.split()]
)
# NumPy's limit.
_MAX_HEADER_BYTES = 4096
_MAX_CAPTIONS = 10**6
_MAX_SIDE = 10**8
_NAMED = 5


def read(place: Storage, split: str, facts: SplitInfo) -> Shaped[np.ndarray, "sample"]:
    """Return a split's index, with all rows inside the split's shards."""
    path = f"{place}/{index_name(split)}"
    try:
        expected_bytes = facts.images * INDEX_DTYPE.itemsize + _MAX_HEADER_BYTES
        data = place.fetch(index_name(split), min(expected_bytes, MAX_INDEX_BYTES))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected the split's index; {CURE}") from None
    # The index pairs images with captions: a damaged one could mispair them silently.
    if hashlib.sha256(data).hexdigest() != facts.index_sha256:
        raise UserError(f"{path}: sha256 differs from the manifest's; {CURE}")
    index = _parse(data, path)
    if len(index) == 0 or len(index) != facts.images:
        raise UserError(
            f"{path}: {len(index):,} images, manifest says {facts.images:,}; expected at least one and the"
            f" same number; {CURE}"
        )
    for fault, rows in _faults(index, facts):
        if len(found := np.flatnonzero(rows)):
            row = dict(zip(INDEX_DTYPE.names or (), index[found[0]].tolist(), strict=True))
            tar = shard_name(split, row["shard"])
            ids = ", ".join(map(str, index["image_id"][found[:_NAMED]]))
            raise UserError(
                f"{path}: {fault.format(tar=tar, **row)}; {len(found):,} such rows, of images {ids}"
                f"{', ...' * (len(found) > _NAMED)}; {CURE}"
            )
    return index


def _parse(data: bytes, path: str) -> Shaped[np.ndarray, "sample"]:
    """Return the rows without a copy, after comparing the header with the file's size."""
    file = io.BytesIO(data)
    try:
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"version {version} of NumPy's format, expected (1, 0)")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    # On a damaged header NumPy raises SyntaxError, TokenError and others.
    except Exception as error:
        raise UserError(f"{path}: not an index ({' '.join(str(error).split()):.200}); {CURE}") from None
    if dtype != INDEX_DTYPE:
        raise UserError(f"{path}: columns {dtype.names!s:.200}, expected {INDEX_DTYPE.names}; {CURE}")
    rows = (len(data) - file.tell()) / INDEX_DTYPE.itemsize
    if fortran_order or len(shape) != 1 or shape[0] != rows:
        raise UserError(
            f"{path}: rows of shape {shape!s:.80} in {'Fortran' if fortran_order else 'C'} order,"
            f" expected ({rows:g},) in C order; {CURE}"
        )
    return np.frombuffer(data, INDEX_DTYPE, offset=file.tell())


def _faults(
    index: Shaped[np.ndarray, "sample"], facts: SplitInfo
) -> Iterator[tuple[str, Bool[np.ndarray, "sample"]]]:
    """Yield each kind of fault with the rows that have it; later checks rely on earlier ones."""
    shards = index["shard"]
    last = len(facts.shards) - 1
    yield f"names {{tar}}, but the manifest has {last + 1:,} shards", (shards < 0) | (shards > last)
    sizes = np.array([shard.size_bytes for shard in facts.shards], np.int64)[shards]
    for part in ("image", "json"):
        offset, size = index[f"{part}_offset"], index[f"{part}_size"]
        # Without sums, which may overflow.
        outside = (offset < 0) | (size < 1) | (size > sizes) | (offset > sizes - size)
        fault = f"{part} of {{{part}_size}} bytes at byte {{{part}_offset}}, expected it within {{tar}}"
        yield fault, outside
    yield "image id {image_id}, expected at least 0", index["image_id"] < 0
    repeated = np.ones(len(index), np.bool_)
    repeated[np.unique(index["image_id"], return_index=True)[1]] = False
    yield "image {image_id} is there again, expected each once", repeated
    captions = index["captions"]
    yield "{captions} captions, expected 0 to a million", (captions < 0) | (captions > _MAX_CAPTIONS)
    sides = [(index[side] < 1) | (index[side] > _MAX_SIDE) for side in ("width", "height")]
    yield "an image of {width} x {height} pixels, expected at least 1 x 1", sides[0] | sides[1]
    yield "{tar} after a later one, expected them in order", np.r_[False, np.diff(shards) < 0]
