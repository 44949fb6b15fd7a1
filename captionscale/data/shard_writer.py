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
from jaxtyping import Shaped

from captionscale import parsing
from captionscale.data import decode, ustar
from captionscale.data.index import INDEX_DTYPE
from captionscale.data.shards import Sample
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.files import atomic_write, open_file

_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_BAD_NAMES = {errno.ENAMETOOLONG, errno.ELOOP}
_CHUNK_BYTES = 8 << 20
_CHUNKS_AHEAD = 2


class _Unreadable(Exception):  # noqa: N818
    """An image that cannot be packed."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write.

    Attributes:
        path: The tar.
        number: Number of the shard in its split.
        records: Records in order.
        full_decode: Decode every image; otherwise check only its header.
        short_side: As in `PackOptions`.
        quality: As in `PackOptions`.
        done: File with the index rows, written when the tar is finished.
    """

    path: Path
    number: int
    records: Sequence[Record]
    full_decode: bool
    short_side: int | None
    quality: int
    done: Path


class RejectedImage(msgspec.Struct, frozen=True):
    """An image that could not be packed.

    Attributes:
        split: Its split.
        image_id: Image id of the data set.
        file: The image file, or the tar and its name in it.
        offset: Offset in the tar, in bytes; 0 for an image file.
        reason: The error.
    """

    split: str
    image_id: int
    file: str
    offset: int
    reason: str


class _Done(msgspec.Struct):
    """Metadata of a finished shard."""

    size_bytes: int
    blake3: str
    rejected: list[RejectedImage]
    stamp: str


_REJECTED, _DONE = msgspec.json.Decoder(RejectedImage), msgspec.json.Decoder(_Done)


def read_rejected(data: bytes, place: str) -> list[RejectedImage]:
    """Parse `rejected.jsonl`; `place` is for errors.

    Raises:
        UserError: It is damaged.
    """
    try:
        return [parsing.decode(line, _REJECTED) for line in data.splitlines() if line]
    except ValueError as error:
        raise UserError(f"{place}: not a list of rejected images ({error}); remove it") from None


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard.

    Attributes:
        rows: Index rows.
        size_bytes: Size of the tar.
        blake3: BLAKE3 of the tar, in hexadecimal.
        rejected: Images that could not be packed.
    """

    rows: Shaped[np.ndarray, "sample"]
    size_bytes: int
    blake3: str
    rejected: list[RejectedImage]


def write_shard(job: ShardJob) -> WrittenShard:
    """Write a tar, then its `done` file.

    Raises:
        UserError: The disk is full or fails, or the folder is read-only.
    """
    rows, rejected = [], []
    stamp = _stamp(job)
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
            rows.append(
                (
                    job.number,
                    tar.add(f"{key}.{info.extension}", data),
                    len(data),
                    tar.add(f"{key}.json", text),
                    len(text),
                    record.image_id,
                    len(record.captions),
                    info.width,
                    info.height,
                    xxhash.xxh3_64_intdigest(data),
                    xxhash.xxh3_64_intdigest(text),
                )
            )
    written = WrittenShard(np.array(rows, INDEX_DTYPE), tar.size_bytes, tar.blake3.hexdigest(), rejected)
    with atomic_write(job.done) as file:
        facts = _Done(written.size_bytes, written.blake3, rejected, stamp)
        np.savez(file, rows=written.rows, facts=np.frombuffer(msgspec.json.encode(facts), np.uint8))
    return written


def load_finished(job: ShardJob) -> WrittenShard | None:
    """Return a shard finished by an earlier call.

    Shards with rejected images, which may have been repaired, and shards whose source files changed since
    (size or time) are written again.
    """
    try:
        with open_file(job.done) as file, np.load(file) as saved:
            # It is written uncompressed; a compressed one could expand to any size.
            if sum(each.file_size for each in saved.zip.infolist()) > os.fstat(file.fileno()).st_size:
                return None
            facts = parsing.decode(saved["facts"].tobytes(), _DONE)
            rows = saved["rows"]
        whole = job.path.stat().st_size == facts.size_bytes and not facts.rejected
        whole = whole and facts.stamp == _stamp(job)
        whole = whole and rows.dtype == INDEX_DTYPE and rows.shape == (len(job.records),)
    # On a damaged file NumPy and zipfile raise nearly any exception.
    except Exception:
        return None
    return WrittenShard(rows, facts.size_bytes, facts.blake3, []) if whole else None


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
    try:
        if job.short_side is None:
            return data, decode.image_info(data, place, full_decode=job.full_decode)
        # Imports torch, which is slow.
        from captionscale.data.resize import resize_to_jpeg

        data = resize_to_jpeg(data, place, side=job.short_side, quality=job.quality)
        return data, decode.image_info(data, place, full_decode=False)
    except UserError as error:
        raise _Unreadable(str(error)) from None


def _stamp(job: ShardJob) -> str:
    """Hash sizes and times of a shard's source files."""
    hasher = hashlib.sha256()
    for path in dict.fromkeys(record.file for record in job.records):
        try:
            status = os.stat(path)  # noqa: PTH116
            hasher.update(f"{status.st_size} {status.st_mtime_ns};".encode())
        except OSError:
            hasher.update(b"gone;")
    return hasher.hexdigest()


class _Tar:
    """A tar that is written and hashed in background threads, by chunks."""

    def __init__(self, file: BinaryIO):
        self.size_bytes = 0
        self.blake3 = blake3()
        self._parts: list[bytes] = []
        self._chunk_bytes = 0
        # One thread each keeps chunks in order.
        sinks: list[Callable[[bytes], Any]] = [file.write, self.blake3.update]
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
        if self._chunk_bytes >= _CHUNK_BYTES:
            self._flush()
        return offset

    def _put(self, part: bytes) -> None:
        self._parts.append(part)
        self.size_bytes += len(part)
        self._chunk_bytes += len(part)

    def _flush(self) -> None:
        chunk = b"".join(self._parts)
        self._parts, self._chunk_bytes = [], 0
        self._busy += [thread.submit(sink, chunk) for sink, thread in self._sinks]
        self._wait(_CHUNKS_AHEAD * len(self._sinks))

    def _wait(self, most: int) -> None:
        while len(self._busy) > most:
            self._busy.popleft().result()
