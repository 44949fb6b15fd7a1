"""Storage of packed shards: a local folder, or a URL read by fsspec.

Remote shards are downloaded whole at their first use, then read from the local cache.
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

# Open files per reader.
_MAX_OPEN_SHARDS = 100


class LocalStorage:
    """A local folder of shards."""

    def __init__(self, path: Path):
        self.path = path
        self._opened = lru_cache(maxsize=_MAX_OPEN_SHARDS)(_Opened)

    def __str__(self) -> str:
        return str(self.path)

    def fetch(self, name: str, max_bytes: int = manifest.MAX_MANIFEST_BYTES) -> bytes:
        """Return a small file of at most `max_bytes`.

        Raises:
            OSError: It is larger, or cannot be read; FileNotFoundError: it does not exist.
            UserError: Its download fails.
        """
        return read_file(self.path / name, max_bytes)

    def check_size(self, shard: Shard) -> None:
        """Compare a shard's size with the manifest."""
        path = self.path / shard.name
        size_bytes = path.stat().st_size if path.is_file() else None
        if size_bytes != shard.size_bytes:
            raise UserError(
                f"{path}: {'missing' if size_bytes is None else f'{size_bytes:,} bytes'}, manifest says"
                f" {shard.size_bytes:,} bytes; {CURE}"
            )

    def pread(self, shard: Shard, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard from `offset`, fewer at its end; thread-safe."""
        path = self.path / shard.name
        return _pread(self._opened(path), path, offset, size)

    @contextmanager
    def local_path(self, shard: Shard) -> Iterator[Path]:
        """Provide a shard as a file."""
        yield self.path / shard.name


class RemoteStorage:
    """Shards behind a URL, with a local cache."""

    def __init__(self, url: str, cache: ShardCache):
        """Open a URL, without using the network; refuse one that no installed package reads."""
        self.url = credentials.strip_and_remember(url).rstrip("/")
        self.cache = cache
        download.require_filesystem(self.url)

    def __str__(self) -> str:
        return self.url

    def fetch(self, name: str, max_bytes: int = manifest.MAX_MANIFEST_BYTES) -> bytes:
        """Download a small file."""
        return download.fetch(self.url, name, max_bytes)

    def check_size(self, shard: Shard) -> None:
        """Do nothing: downloads are checked."""

    def pread(self, shard: Shard, offset: int, size: int) -> bytes:
        """As `LocalStorage.pread`."""
        with self._open(shard) as file:
            return _pread(file, self.cache.path(shard), offset, size)

    @contextmanager
    def local_path(self, shard: Shard) -> Iterator[Path]:
        """Provide a shard as a file, with its hash checked again; a damaged one is downloaded again."""
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
    """Wrap a path."""
    return LocalStorage(where) if isinstance(where, Path) else where


def read_manifest(place: Storage) -> manifest.Manifest:
    """Return the manifest of shards."""
    return manifest.fetch(place.fetch, str(place))


def open_storage(where: str, cache: Path | None = None, cache_gb: float = DEFAULT_CACHE_GB) -> Storage:
    """Open a folder or URL of shards, with a cache of at most `cache_gb` * 10^9 bytes for remote ones."""
    path = where.removeprefix("file://")
    return RemoteStorage(where, ShardCache(cache, cache_gb)) if "://" in path else LocalStorage(Path(path))


class _Opened:
    """A file that stays open while referenced: one thread may read what another evicts."""

    def __init__(self, path: Path):
        try:
            # Without O_NONBLOCK, a named pipe would block.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}, expected to read it; {CURE}") from None
        weakref.finalize(self, os.close, self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def _pread(file: "_Opened | IO[bytes]", path: Path, offset: int, size: int) -> bytes:
    # Takes the file, not its descriptor, which could be reused after closing.
    try:
        return os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror} at byte {offset:,}, expected {size:,} bytes; {CURE}"
        ) from None
