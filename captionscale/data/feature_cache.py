"""Features of all images of a split in one file, for an encoder that does not change.

`features/<split>-<key>.npy` next to the shards is a NumPy file with a row for each image in the order of the
split's index: half-precision numbers, [region, feature], and their hash. The key is a hash of all that they
depend on. A partial file ends in `.tmp`; its missing rows have no hash.
"""

import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from jaxtyping import Float16, Int, Shaped

from captionscale.data.storage import RemoteStorage, Storage
from captionscale.errors import UserError
from captionscale.files import open_file
from captionscale.progress import say

_PARTIAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*-[0-9a-f]{16}\.npy\.tmp")


class FeatureReader:
    """Features by row of the split's index, read on access and compared with their hash.

    Attributes:
        shape: Regions, features.
    """

    def __init__(self, path: Path, rows: Shaped[np.ndarray, "image"]):
        self.path, self._rows = path, rows
        self.shape: tuple[int, int] = rows.dtype["features"].shape

    def __getitem__(self, item: int) -> Float16[np.ndarray, "region feature"]:
        row = self._rows[item]
        features = np.array(row["features"])
        if _hash(features) != row["hash"]:
            raise UserError(
                f"{self.path}: row {item:,} is damaged, expected the features that were written; delete the"
                " file, and the next run computes it again"
            )
        return features


@dataclass(frozen=True)
class FeatureFile:
    """The file of a split's features, of the shape images, regions, features.

    `create` makes a partial file, `write` fills it, and `finish` gives it its name.
    """

    path: Path
    shape: tuple[int, int, int]

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self._header) + self.shape[0] * self._row.itemsize

    def open(self) -> FeatureReader:
        """Return the file's content; refuse a file that is damaged or missing."""
        try:
            fault = self._fault(self.path)
            if not fault:
                return FeatureReader(self.path, np.lib.format.open_memmap(self.path, mode="r"))
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}, expected the features of images; all machines of a run must"
                " see one folder of shards; or set train.cache_features = false"
            ) from None
        raise UserError(
            f"{self.path}: damaged ({fault}), expected {self.size_bytes:,} bytes that hold {self.shape}"
            " numbers of half precision; delete it, and the next run computes it again"
        )

    def create(self) -> None:
        """Create the partial file, or keep one of an earlier run."""
        if self.partial.exists() and not self._fault(self.partial):
            return
        with self.partial.open("wb") as file:
            file.write(self._header)
            file.truncate(self.size_bytes)

    def missing_rows(self) -> Int[np.ndarray, "missing"]:
        """Return the rows that the partial file lacks."""
        rows = np.lib.format.open_memmap(self.partial, mode="r")
        return np.flatnonzero(rows["hash"] == 0)

    def write(self, start: int, features: Shaped[np.ndarray, "image region feature"]) -> None:
        """Write features into the partial file, from the row `start` of the split's index."""
        with np.errstate(over="ignore"):
            halves = features.astype("<f2")
        if not np.isfinite(halves).all():
            raise UserError(
                f"{self.path}: a feature of the images from row {start:,} of the index on is"
                f" {np.abs(features).max():g}, expected at most {np.finfo(np.float16).max:g}, the most that"
                " half precision holds; set train.cache_features = false"
            )
        rows = np.empty(len(halves), self._row)
        rows["features"], rows["hash"] = halves, [_hash(each) for each in halves]
        with self._open_partial() as file:
            file.seek(len(self._header) + start * self._row.itemsize)
            file.write(rows.tobytes())

    def sync(self) -> None:
        """Sync to disk what this process has written."""
        with self._open_partial() as file:
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the filled file its name."""
        self.partial.replace(self.path)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    @property
    def partial(self) -> Path:
        """The file that is being filled."""
        return self.path.with_name(self.path.name + ".tmp")

    @contextmanager
    def _open_partial(self) -> Iterator[IO[bytes]]:
        try:
            with self.partial.open("r+b") as file:
                yield file
        except OSError as error:
            raise UserError(
                f"{self.partial}: cannot be written ({error.strerror}), expected a folder that all processes"
                " share, with free space; free the disk, or set train.cache_features = false"
            ) from None

    def _fault(self, path: Path) -> str:
        """Return how a file differs from this shape; empty if it does not."""
        with open_file(path) as file:
            header, size_bytes = file.read(len(self._header)), os.fstat(file.fileno()).st_size
        if header != self._header:
            return "another header"
        return f"{size_bytes:,} bytes" if size_bytes != self.size_bytes else ""

    @property
    def _row(self) -> np.dtype[np.void]:
        return np.dtype([("hash", "<u8"), ("features", "<f2", self.shape[1:])])

    @property
    def _header(self) -> bytes:
        file = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self._row)
        facts = {"descr": descr, "fortran_order": False, "shape": self.shape[:1]}
        np.lib.format.write_array_header_1_0(file, facts)
        return file.getvalue()


def features_folder(place: Storage) -> Path:
    """Return the folder of features next to the shards; refuse shards behind a URL."""
    if isinstance(place, RemoteStorage):
        raise UserError(
            f"data.shards = {place}: is a URL, but train.cache_features keeps features next to the shards;"
            " expected a folder of this machine; copy the shards to one, or set train.cache_features = false"
        )
    return place.path / "features"


def create_all(files: Sequence[FeatureFile]) -> None:
    """Create all partial files, and report their size; refuse a disk that is too small."""
    folder, size_bytes = files[0].path.parent, sum(each.size_bytes for each in files)
    try:
        # A user's own file has another name.
        partial_files = {each for each in folder.iterdir() if _PARTIAL_NAME.fullmatch(each.name)}
        free = shutil.disk_usage(folder).free + sum(each.stat().st_blocks * 512 for each in partial_files)
        if free < size_bytes:
            raise UserError(
                f"{folder}: {free / 1e9:,.2f} GB are free, expected {size_bytes / 1e9:,.2f} GB for the"
                f" features of {sum(each.shape[0] for each in files):,} images; free the disk, or set"
                " train.cache_features = false"
            )
        for each in partial_files - {file.partial for file in files}:
            each.unlink()
        for file in files:
            file.create()
            regions, numbers = file.shape[1:]
            say(
                f"computing features of {len(file.missing_rows()):,} images ({regions:,} x {numbers:,}"
                f" numbers each), once: {file.size_bytes / 1e9:,.2f} GB in {file.path}"
            )
    except OSError as error:
        raise cannot_write(folder, error) from None


def cannot_write(folder: Path, error: OSError) -> UserError:
    """Return the error for a folder that is not writable."""
    return UserError(
        f"{folder}: {(error.strerror or str(error)).lower()}, expected to keep features there"
        " (train.cache_features); make the folder writable, copy the shards, or set"
        " train.cache_features = false"
    )


def _hash(features: Float16[np.ndarray, "region feature"]) -> int:
    # Never 0, which marks a missing row.
    return xxhash.xxh3_64_intdigest(features.tobytes()) or 1
