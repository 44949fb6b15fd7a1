"""Where packed folders are: on a disk, or behind a URL that fsspec can read.

Both places answer alike. A local folder is read where it is; of a remote one, each shard is downloaded
whole at its first use and then read from the local cache.
"""

import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import IO

from captionscale import credentials
from captionscale.config import DEFAULT_CACHE_GB
from captionscale.data import download, manifest
from captionscale.data.manifest import CURE, Shard
from captionscale.data.shard_cache import ShardCache
from captionscale.errors import UserError
from captionscale.files import blake3_of, read_file

_MAX_OPEN_SHARDS = 100
"""Shards of a folder that one reader keeps open."""


class LocalStorage:
    """A packed folder on a disk of this machine."""

    def __init__(self, path: Path):
        self.path = path
        self._opened = lru_cache(maxsize=_MAX_OPEN_SHARDS)(_Opened)

    def __str__(self) -> str:
        return str(self.path)

    def fetch(self, name: str, max_bytes: int = manifest.MAX_MANIFEST_BYTES) -> bytes:
        """Return a small file whole, of at most so many bytes.

        Raises:
            OSError: It is larger, or cannot be read; FileNotFoundError: it is not there.
        """
        return read_file(self.path / name, max_bytes)

    def check_size(self, shard: Shard) -> None:
        """Compare a shard's size with the manifest's.

        Raises:
            UserError: It is missing or of another size.
        """
        path = self.path / shard.name
        size_bytes = path.stat().st_size if path.is_file() else None
        if size_bytes != shard.size_bytes:
            raise UserError(
                f"{path}: {'missing' if size_bytes is None else f'{size_bytes:,} bytes'}, manifest says"
                f" {shard.size_bytes:,} bytes; {CURE}"
            )

    def pread(self, shard: Shard, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard from byte `offset` on, fewer where it ends; safe from many threads.

        Raises:
            UserError: It is not there any more, or the disk fails.
        """
        path = self.path / shard.name
        return _pread(self._opened(path), path, offset, size)

    @contextmanager
    def local_path(self, shard: Shard) -> Iterator[Path]:
        """Give a whole shard as a file."""
        yield self.path / shard.name


class RemoteStorage:
    """A packed folder behind a URL, with its local cache."""

    def __init__(self, url: str, cache: ShardCache):
        """Name the folder, without using the network.

        Raises:
            UserError: Nothing installed can read such a URL.
        """
        self.url = credentials.strip_and_remember(url).rstrip("/")
        self.cache = cache
        download.require_filesystem(self.url)

    def __str__(self) -> str:
        return self.url

    def fetch(self, name: str, max_bytes: int = manifest.MAX_MANIFEST_BYTES) -> bytes:
        """Return a small file whole, from the network; no more than so many bytes of it come.

        Raises:
            FileNotFoundError: It is not there.
            UserError: The server does not give it, or it is larger.
        """
        return download.fetch(self.url, name, max_bytes)

    def check_size(self, shard: Shard) -> None:
        """Do nothing: a download is compared with the manifest when it comes."""

    def pread(self, shard: Shard, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard from byte `offset` on; safe from many threads.

        Raises:
            UserError: The server or the local disk fails, or what comes is not what was packed.
        """
        with self._open(shard) as file:
            return _pread(file, self.cache.path(shard), offset, size)

    @contextmanager
    def local_path(self, shard: Shard) -> Iterator[Path]:
        """Give a whole shard as a file, with its hash compared anew and, if it rotted, downloaded anew.

        Raises:
            UserError: As `pread` does.
        """
        path = self.cache.path(shard)
        with self._open(shard):
            whole = blake3_of(path) == shard.blake3
        if not whole:
            path.unlink(missing_ok=True)
        with self._open(shard):
            yield path

    def _open(self, shard: Shard) -> AbstractContextManager[IO[bytes]]:
        return self.cache.open(shard, partial(download.download, self.url, shard))


Storage = LocalStorage | RemoteStorage


def as_storage(where: Storage | Path) -> Storage:
    """Return a folder as the place that it is."""
    return LocalStorage(where) if isinstance(where, Path) else where


def read_manifest(place: Storage) -> manifest.Manifest:
    """Return what a packed folder says of itself.

    Raises:
        UserError: No manifest, a damaged one, or one of another format; the server does not give it.
    """
    return manifest.fetch(place.fetch, str(place))


def open_storage(where: str, cache: Path | None = None, cache_gb: float = DEFAULT_CACHE_GB) -> Storage:
    """Return the place of a packed folder.

    Args:
        where: A folder, or a URL such as `s3://bucket/coco`.
        cache: Folder that keeps the shards of a URL; None: the user's.
        cache_gb: What it may hold at most, in 10^9 bytes.

    Raises:
        UserError: Nothing installed can read such a URL.
    """
    path = where.removeprefix("file://")
    return RemoteStorage(where, ShardCache(cache, cache_gb)) if "://" in path else LocalStorage(Path(path))


class _Opened:
    """A file that is open as long as anyone holds this: a thread may read what another one forgets."""

    def __init__(self, path: Path):
        try:
            # A named pipe would wait for a writer for ever.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}, wanted to read it; {CURE}") from None
        weakref.finalize(self, os.close, self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def _pread(file: "_Opened | IO[bytes]", path: Path, offset: int, size: int) -> bytes:
    # The whole file, not its number: who holds the number only may read from what has taken it since.
    try:
        return os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror} at byte {offset:,}, wanted {size:,} bytes; {CURE}"
        ) from None
