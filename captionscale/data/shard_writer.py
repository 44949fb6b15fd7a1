"""Write one shard and its index rows."""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import xxhash
from blake3 import blake3

from captionscale import parsing
from captionscale.data import decode, ustar
from captionscale.data.index import INDEX_DTYPE
from captionscale.data.manifest import MAX_REJECTED_BYTES, Images, Shard
from captionscale.data.shards import Sample
from captionscale.data.sources.record import Record
from captionscale.data.storage import Storage, as_storage
from captionscale.errors import UserError
from captionscale.files import MB, atomic_write, read_file

REJECTED = "rejected.jsonl"
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_BAD_NAMES = {errno.ENAMETOOLONG, errno.ELOOP}
# Of the file `done`: 120 bytes for each image.
_MAX_DONE_BYTES = 4096 * MB
_CHUNK_BYTES = 8 << 20
_CHUNKS_AHEAD = 2


class _Unreadable(Exception):  # noqa: N818
    """An image that cannot be packed."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the tar `path`, and then the file `done`, which is a `WrittenShard`."""

    path: Path
    number: int
    records: Sequence[Record]
    full_decode: bool
    images: Images
    done: Path


class RejectedImage(msgspec.Struct, frozen=True):
    """An image that could not be packed: where it is, as in `Record`, and the error."""

    split: str
    image_id: int
    file: str
    offset: int
    reason: str


class WrittenShard(msgspec.Struct, frozen=True):
    """A finished shard.

    Attributes:
        info: Its manifest entry.
        rows: Its index rows, as bytes of `INDEX_DTYPE`.
        rejected: Images that could not be packed.
        stamp: Hash of the sizes and times of its source files, of the tar and of the rows.
    """

    info: Shard
    rows: bytes
    rejected: list[RejectedImage]
    stamp: str


def read_rejected(where: Storage | Path) -> list[RejectedImage]:
    """Return the rejected images of shards.

    Raises:
        UserError: The list is damaged.
    """
    place, decoder = as_storage(where), msgspec.json.Decoder(RejectedImage)
    try:
        lines = place.fetch(REJECTED, MAX_REJECTED_BYTES).splitlines()
        return [parsing.decode(line, decoder) for line in lines if line]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{place}/{REJECTED}: not a list of rejected images ({error}); remove it") from None


def write_shard(job: ShardJob) -> WrittenShard:
    """Write a tar, then its `done` file."""
    rows, rejected = [], []
    stamp = _source_stamp(job)
    with atomic_write(job.path) as file, _Tar(file) as tar:
        for record in job.records:
            try:
                data, info = _image(record, job)
            except _Unreadable as error:
                place = record.place
                reason = str(error).removeprefix(f"{place}: ")
                rejected.append(RejectedImage(record.split, record.image_id, place, record.offset, reason))
                continue
            text = msgspec.json.encode(Sample(record.image_id, record.name, record.captions))
            key = f"{record.image_id:012d}"
            image_offset = tar.add(f"{key}.{info.extension}", data)
            json_offset = tar.add(f"{key}.json", text)
            location = (job.number, image_offset, len(data), json_offset, len(text))
            facts = (record.image_id, len(record.captions), info.width, info.height)
            hashes = (xxhash.xxh3_64_intdigest(data), xxhash.xxh3_64_intdigest(text))
            rows.append((*location, *facts, *hashes))
    shard = Shard(job.path.name, tar.size_bytes, tar.blake3.hexdigest(), len(rows))
    index = np.array(rows, INDEX_DTYPE).tobytes()
    stamp.update(shard.blake3.encode() + index)
    written = WrittenShard(shard, index, rejected, stamp.hexdigest())
    with atomic_write(job.done) as file:
        file.write(msgspec.json.encode(written))
    return written


def load_finished(job: ShardJob) -> WrittenShard | None:
    """Return a shard finished by an earlier call.

    Shards with rejected images, which may have been repaired, and shards whose source files changed since
    (size or time) are written again.
    """
    try:
        found = parsing.decode(read_file(job.done, _MAX_DONE_BYTES), msgspec.json.Decoder(WrittenShard))
        whole = job.path.stat().st_size == found.info.size_bytes and not found.rejected
    except (OSError, ValueError):
        return None
    stamp = _source_stamp(job)
    stamp.update(found.info.blake3.encode() + found.rows)
    whole = whole and len(found.rows) == len(job.records) * INDEX_DTYPE.itemsize
    return found if whole and found.stamp == stamp.hexdigest() else None


def _image(record: Record, job: ShardJob) -> tuple[bytes, decode.ImageInfo]:
    place = record.place
    try:
        data = record.read()
    except (*_GONE, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _Unreadable(f"cannot be read ({reason}); put it back or copy it again") from None
    except OSError as error:
        if error.errno in _BAD_NAMES:
            raise _Unreadable(f"cannot be read ({error.strerror}); rename it") from None
        raise UserError(
            f"{place}: {error.strerror}, a fault of the disk or server, not of the image; finished"
            " shards are kept; repair it and run the same command again"
        ) from None
    side, quality = job.images.short_side, job.images.quality
    try:
        if side is None or quality is None:
            return data, decode.image_info(data, place, full_decode=job.full_decode)
        # Imports torch, which is slow.
        from captionscale.data.resize import resize_to_jpeg

        data = resize_to_jpeg(data, place, side=side, quality=quality)
        return data, decode.image_info(data, place, full_decode=False)
    except UserError as error:
        raise _Unreadable(str(error)) from None


def _source_stamp(job: ShardJob) -> "hashlib._Hash":
    """Hash sizes and times of a shard's source files."""
    hasher = hashlib.sha256()
    for path in dict.fromkeys(record.file for record in job.records):
        try:
            status = os.stat(path)  # noqa: PTH116
            hasher.update(f"{status.st_size} {status.st_mtime_ns};".encode())
        except OSError:
            hasher.update(b"gone;")
    return hasher


class _Tar:
    """A tar that is written and hashed in background threads, by chunks."""

    def __init__(self, file: BinaryIO):
        self.size_bytes = 0
        self.blake3 = blake3()
        self._chunk = bytearray()
        # One thread each keeps chunks in order.
        sinks: list[Callable[[bytearray], Any]] = [file.write, self.blake3.update]
        self._sinks = [(sink, ThreadPoolExecutor(1)) for sink in sinks]
        self._busy: deque[Future[Any]] = deque()

    def __enter__(self) -> "_Tar":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._put(ustar.END)
                self._flush()
                self._wait(0)
        finally:
            for _, thread in self._sinks:
                thread.shutdown()

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its bytes."""
        self._put(ustar.header(name, len(data)))
        offset = self.size_bytes
        self._put(data)
        self._put(ustar.padding(len(data)))
        if len(self._chunk) >= _CHUNK_BYTES:
            self._flush()
        return offset

    def _put(self, part: bytes) -> None:
        self._chunk += part
        self.size_bytes += len(part)

    def _flush(self) -> None:
        chunk, self._chunk = self._chunk, bytearray()
        self._busy += [thread.submit(sink, chunk) for sink, thread in self._sinks]
        self._wait(_CHUNKS_AHEAD * len(self._sinks))

    def _wait(self, most: int) -> None:
        while len(self._busy) > most:
            self._busy.popleft().result()
