"""Features of all images of a split in one file, for an encoder that does not change.

`features/<split>-<key>.npy` beside the shards is a NumPy file, of a row for each image in the order of the
split's index: half-precision numbers, [region, feature], and their hash. The key is a hash of all that they
depend on. What is being written ends in `.tmp`; its rows without a hash are still to come.
"""

import io
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Float16, Int, Shaped

from captionscale.data.storage import RemoteStorage, Storage
from captionscale.errors import UserError
from captionscale.files import open_file
from captionscale.progress import say

_PARTIAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*-[0-9a-f]{16}\.npy\.tmp")


class FeatureReader:
    """Features that are read where they are used, each proven whole."""

    def __init__(self, path: Path, rows: Shaped[np.ndarray, "image"]):
        """Take a file's rows, as `FeatureFile.open` finds them."""
        self.path, self._rows = path, rows
        self.shape: tuple[int, int] = rows.dtype["features"].shape
        """Regions, features."""

    def __getitem__(self, item: int) -> Float16[np.ndarray, "region feature"]:
        """Return the features of an image.

        Args:
            item: A row of the split's index.

        Raises:
            UserError: They are not those that were written.
        """
        row = self._rows[item]
        features = np.array(row["features"])
        if _hash(features) != row["hash"]:
            raise UserError(
                f"{self.path}: row {item:,} is damaged, expected the features that were written; delete the"
                " file, and the next run computes it anew"
            )
        return features


@dataclass(frozen=True)
class FeatureFile:
    """The features of a split's images: where they are, and of what shape."""

    path: Path
    shape: tuple[int, int, int]
    """Images, regions, features."""

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return len(self._header) + self.shape[0] * self._row.itemsize

    def open(self) -> FeatureReader:
        """Return what the file holds.

        Raises:
            UserError: It is damaged, or not there.
        """
        try:
            with open_file(self.path) as file:
                header, size_bytes = file.read(len(self._header)), os.fstat(file.fileno()).st_size
            if header == self._header and size_bytes == self.size_bytes:
                return FeatureReader(self.path, np.lib.format.open_memmap(self.path, mode="r"))
            found = f"{size_bytes:,} bytes" if header == self._header else "another header"
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}, expected the features of images; all machines of a run must"
                " see one folder of shards; or set train.cache_features = false"
            ) from None
        raise UserError(
            f"{self.path}: damaged ({found}), expected {self.size_bytes:,} bytes that hold {self.shape}"
            " numbers of half precision; delete it, and the next run computes it anew"
        )

    def create(self) -> None:
        """Make the file that is to be filled, or go on with one that was begun and not finished.

        Raises:
            OSError: The folder is read-only.
        """
        if self.partial.exists() and self.partial.stat().st_size == self.size_bytes:
            with open_file(self.partial) as file:
                if file.read(len(self._header)) == self._header:
                    return
        with self.partial.open("wb") as file:
            file.write(self._header)
            file.truncate(self.size_bytes)

    def missing_rows(self) -> Int[np.ndarray, "missing"]:
        """Return the rows of the file that was begun that are still to come."""
        rows = np.lib.format.open_memmap(self.partial, mode="r")
        return np.flatnonzero(rows["hash"] == 0)

    def write(self, start: int, features: Shaped[np.ndarray, "image region feature"]) -> None:
        """Put features into the file that was begun.

        Args:
            start: Row of the split's index that the first of them belongs to.
            features: Of numbers that half precision can hold.

        Raises:
            UserError: They are too large, or the disk fails.
        """
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
        try:
            with self.partial.open("r+b") as file:
                file.seek(len(self._header) + start * self._row.itemsize)
                file.write(rows.tobytes())
        except OSError as error:
            raise self._unwritten(error) from None

    def sync(self) -> None:
        """Have what this process has written on the disk itself.

        Raises:
            UserError: The disk fails.
        """
        try:
            with self.partial.open("r+b") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritten(error) from None

    def finish(self) -> None:
        """Give the filled file its name."""
        self.partial.replace(self.path)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(
            f"{self.partial}: cannot be written ({error.strerror}), expected a folder that all processes"
            " share, with free space; free the disk, or set train.cache_features = false"
        )

    @property
    def partial(self) -> Path:
        """The file that was begun."""
        return self.path.with_name(self.path.name + ".tmp")

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
    """Return the folder of features beside shards.

    Raises:
        UserError: The shards are behind a URL.
    """
    if isinstance(place, RemoteStorage):
        raise UserError(
            f"data.shards = {place}: is a URL, but train.cache_features keeps features beside the shards;"
            " expected a folder of this machine; copy the shards to one, or set train.cache_features = false"
        )
    return place.path / "features"


def create_all(files: Sequence[FeatureFile]) -> None:
    """Make all files ready to be filled, and tell how large they will be.

    Raises:
        UserError: The disk has not that much room, or the folder is read-only.
    """
    folder, size_bytes = files[0].path.parent, sum(each.size_bytes for each in files)
    try:
        # A user's own file has another name.
        begun = {each for each in folder.iterdir() if _PARTIAL_NAME.fullmatch(each.name)}
        free = shutil.disk_usage(folder).free + sum(each.stat().st_blocks * 512 for each in begun)
        if free < size_bytes:
            raise UserError(
                f"{folder}: {free / 1e9:,.2f} GB are free, expected {size_bytes / 1e9:,.2f} GB for the"
                f" features of {sum(each.shape[0] for each in files):,} images; free the disk, or set"
                " train.cache_features = false"
            )
        for each in begun - {file.partial for file in files}:
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
    """Return what is to be said of a folder in which nothing can be written."""
    return UserError(
        f"{folder}: {(error.strerror or str(error)).lower()}, expected to keep features there"
        " (train.cache_features); make the folder writable, copy the shards, or set"
        " train.cache_features = false"
    )


def _hash(features: Float16[np.ndarray, "region feature"]) -> int:
    """Return a number for an image's features that is never 0."""
    return xxhash.xxh3_64_intdigest(features.tobytes()) or 1
