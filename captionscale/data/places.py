"""Where packed folders are: on a disk, or behind a URL that fsspec can read.

Both places answer alike. A local folder is read where it is; of a remote one, each shard is downloaded
whole at its first use and then read from the local cache.
"""

import errno
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar

from captionscale.config import CACHE_GB
from captionscale.data import manifest
from captionscale.data.cache import Cache
from captionscale.data.manifest import CURE, Shard
from captionscale.errors import UserError
from captionscale.files import blake3_of, read_file
from captionscale.progress import Bar, progress, say

T = TypeVar("T")

_MB = 10**6
_KEPT = 100
"""Shards of a folder that one reader keeps open."""
_CONNECT_S = 20.0
_SILENCE_S = 60.0
"""A server that sends nothing for so long is given up."""
_WAITS_S = (0.5, 2.0, 8.0)
"""Before the second, the third and the last try."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Folder:
    """A packed folder on a disk of this machine."""

    def __init__(self, path: Path):
        self.path = path
        self._opened = lru_cache(maxsize=_KEPT)(_Opened)

    def __str__(self) -> str:
        return str(self.path)

    def fetch(self, name: str) -> bytes:
        """Return a small file whole.

        Raises:
            OSError: It cannot be read; FileNotFoundError: it is not there.
        """
        return read_file(self.path / name, manifest.MAX_BYTES)

    def check(self, shard: Shard) -> None:
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
    def local(self, shard: Shard) -> Iterator[Path]:
        """Give a whole shard as a file."""
        yield self.path / shard.name


class Remote:
    """A packed folder behind a URL, with its local cache."""

    def __init__(self, url: str, cache: Cache):
        """Name the folder, without using the network.

        Raises:
            UserError: Nothing installed can read such a URL.
        """
        self.url = url.rstrip("/")
        self.cache = cache
        _filesystem(self.url)

    def __str__(self) -> str:
        return self.url

    def fetch(self, name: str) -> bytes:
        """Return a small file whole, from the network.

        Raises:
            FileNotFoundError: It is not there.
            UserError: The server does not give it.
        """
        data: bytes = _patiently(f"{self.url}/{name}", lambda files, path: files.cat_file(path), _WAITS_S)
        return data

    def check(self, shard: Shard) -> None:
        """Do nothing: a download is compared with the manifest when it comes."""

    def pread(self, shard: Shard, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard from byte `offset` on; safe from many threads.

        Raises:
            UserError: The server or the local disk fails, or what comes is not what was packed.
        """
        with self._open(shard) as file:
            return _pread(file, self.cache.path(shard), offset, size)

    @contextmanager
    def local(self, shard: Shard) -> Iterator[Path]:
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
        return self.cache.open(shard, partial(_download, f"{self.url}/{shard.name}", shard))


Place = Folder | Remote


def as_place(where: Place | Path) -> Place:
    """Return a folder as the place that it is."""
    return Folder(where) if isinstance(where, Path) else where


def manifest_of(place: Place) -> manifest.Manifest:
    """Return what a packed folder says of itself.

    Raises:
        UserError: No manifest, a damaged one, or one of another format; the server does not give it.
    """
    return manifest.fetch(place.fetch, str(place))


def open_place(where: str, cache: Path | None = None, cache_gb: float = CACHE_GB) -> Place:
    """Return the place of a packed folder.

    Args:
        where: A folder, or a URL such as `s3://bucket/coco`.
        cache: Folder that keeps the shards of a URL; None: the user's.
        cache_gb: What it may hold at most, in 10^9 bytes.

    Raises:
        UserError: Nothing installed can read such a URL.
    """
    path = where.removeprefix("file://")
    return Remote(where, Cache(cache, cache_gb)) if "://" in path else Folder(Path(path))


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


def _download(url: str, shard: Shard, path: Path) -> None:
    """Write a shard to `path`, proven to be the manifest's."""

    def arrive(files: Any, source: str) -> None:
        # The last one is begun, and never whole.
        total = shard.size_bytes // _MB + 1
        quiet = os.environ.get("RANK", "0") != "0"
        with progress(f"downloading {url}, MB", total, quiet=quiet, passing=True, lines=True) as bar:
            files.get_file(source, str(path), callback=_counting(bar))
            bar.advance()
        found = blake3_of(path)
        size_bytes = path.stat().st_size
        if (size_bytes, found) != (shard.size_bytes, shard.blake3):
            raise UserError(
                f"{url}: {size_bytes:,} bytes with blake3 {found[:12]}... came, manifest says"
                f" {shard.size_bytes:,} bytes with {shard.blake3[:12]}...; {CURE}"
            )

    try:
        _patiently(url, arrive, _WAITS_S)
    except FileNotFoundError:
        raise UserError(f"{url}: missing, manifest says {shard.size_bytes:,} bytes; {CURE}") from None


def _counting(bar: Bar) -> Any:
    """Return what fsspec tells of the bytes that come, for a bar of megabytes."""
    from fsspec.callbacks import Callback

    class Counting(Callback):  # type: ignore[misc]
        came = 0

        def relative_update(self, inc: int = 1) -> None:
            before, self.came = self.came, self.came + inc
            if whole := self.came // _MB - before // _MB:
                bar.advance(whole)

    return Counting()


def _filesystem(url: str) -> tuple[Any, str]:
    """Return what reads a URL, and the name by which it knows the file.

    fsspec keeps one for each process, so that a fork gets its own.
    """
    import fsspec

    # After Ctrl-C in a download asyncio would complain of what it had begun.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    protocol = url.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
        options: dict[str, Any] = {}
        if protocol in ("http", "https", "gs", "gcs"):
            from aiohttp import ClientTimeout

            # aiohttp's own would end a download after five minutes, however well it goes.
            timeout = ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
            options = {"requests_timeout": timeout}
            if protocol in ("http", "https"):
                configured = fsspec.config.apply_config(kind, {}).get("client_kwargs", {})
                # Proxies and .netrc, as other programs read them.
                options = {"timeout": timeout, "client_kwargs": {"trust_env": True, **configured}}
        files, path = fsspec.core.url_to_fs(url, **options)
        return files, path
    except ImportError as error:
        raise UserError(
            f"{url}: no package that reads {protocol}:// ({error}); wanted captionscale's extra 'remote';"
            " pip install 'captionscale[remote]'"
        ) from None
    # What each of fsspec's many file systems raises is its own affair.
    except Exception as error:
        raise _explained(url, error) from None


def _patiently(url: str, action: Callable[[Any, str], T], waits_s: tuple[float, ...]) -> T:
    """Do something with a remote file, again if what hinders it may pass."""
    files, path = _filesystem(url)
    try:
        return action(files, path)
    except FileNotFoundError:
        raise
    except UserError as error:
        failure = error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        failure = _explained(url, error)
        # Those of S3 and Google retry by themselves.
        passing = url.startswith(("http://", "https://")) and not isinstance(error, ValueError)
        if _refused(error) or not passing:
            raise failure from None
    if not waits_s:
        raise failure
    say(f"{failure}; trying again in {waits_s[0]:g} s")
    time.sleep(waits_s[0])
    return _patiently(url, action, waits_s[1:])


def _explained(url: str, error: Exception) -> UserError:
    """Return what the user can do about what a file system of fsspec raised."""
    found = " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")
    if _refused(error):
        return UserError(
            f"{url}: not allowed, or not there ({found}); wanted the right to read it; check the URL and give"
            " credentials, such as AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS or .netrc"
        )
    return UserError(
        f"{url}: cannot be read ({found}); wanted the file; check the URL and the network, then run the same"
        " command again"
    )


def _refused(error: Exception) -> bool:
    # aiohttp and gcsfs tell HTTP's number, each by its own name; botocore tells the absence of credentials.
    number = vars(error).get("status", vars(error).get("code"))
    final = isinstance(number, int) and 400 <= number < 500 and number not in (408, 429)
    return final or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
