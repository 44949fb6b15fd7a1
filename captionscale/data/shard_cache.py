"""A size-limited cache of downloaded shards, shared by data sets, processes, nodes and users.

Shards are named by their BLAKE3. Readers hold a shared file lock; a file is removed only under an exclusive
one. The system releases the locks of a process that dies. On a file system without locks, a shard may be
downloaded twice. Files get the folder's permissions, whatever the umask.
"""

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from captionscale.data.manifest import CURE, Shard
from captionscale.errors import UserError

# The name of a download has its final size: the file grows only while it is written.
_OURS = re.compile(r"[0-9a-f]{64}(?:\.tar|\.(?P<bytes>\d+)\.[0-9a-f]{32}\.tmp)")
_BLAKE3 = re.compile(r"[0-9a-f]{64}")
_SPACE_LOCK = "room.lock"
_LEFT_OVER_S = 3600
_WAIT_FOR_SPACE_S = 600.0
_SAME_USE_S = 10.0


class ShardCache:
    """Local copies of remote shards; safe for threads and forks."""

    def __init__(self, folder: Path | None, limit_gb: float):
        """Use a folder, created with the first shard, of at most `limit_gb` * 10^9 bytes.

        The default is `$CAPTIONSCALE_CACHE`, else `captionscale` in `$XDG_CACHE_HOME` or `~/.cache`.
        """
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "captionscale")
        place = folder or Path(os.environ.get("CAPTIONSCALE_CACHE") or default)
        try:
            self.folder = place.expanduser().absolute()
        except RuntimeError:
            raise UserError(
                f"{place}: no such home, expected a folder for shards; set data.cache or CAPTIONSCALE_CACHE"
            ) from None
        self.limit_bytes = limit_gb * 1e9

    def __str__(self) -> str:
        return f"{self.folder} ({self.limit_bytes / 1e9:g} GB at most)"

    @contextmanager
    def open(self, shard: Shard, download: Callable[[Path], None]) -> Iterator[IO[bytes]]:
        """Open a shard, downloaded if missing; it is not removed while open.

        Keep it open only while reading: other processes may wait for its space. `download` writes the shard
        to a path and checks its hash; the size is checked at each opening.
        """
        try:
            while (file := self._open_cached(shard)) is None:
                self._download(shard, download)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: {error.strerror or error}; expected a folder that can keep"
                f" {shard.name} ({shard.size_bytes:,} bytes); free the disk, correct the rights, or set"
                " data.cache or CAPTIONSCALE_CACHE to another folder"
            ) from None
        with file:
            yield file

    def path(self, shard: Shard) -> Path:
        """Return the path of a shard, whether or not it exists."""
        if not _BLAKE3.fullmatch(shard.blake3):
            raise UserError(f"{shard.name}: blake3 {shard.blake3!r:.80} in the manifest is not one; {CURE}")
        return self.folder / f"{shard.blake3}.tar"

    def _open_cached(self, shard: Shard) -> IO[bytes] | None:
        """Open a cached shard of the right size, with a shared lock."""
        path = self.path(shard)
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        _flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        # It may have been removed between opening and locking.
        if status.st_size != shard.size_bytes or not path.exists():
            file.close()
            return None
        if time.time() - status.st_mtime > _SAME_USE_S:
            # Another user's cache may be read-only.
            with suppress(OSError):
                os.utime(path)
        return file

    def _download(self, shard: Shard, download: Callable[[Path], None]) -> None:
        path = self.path(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        # The 256 lock files stay: removing one that others wait for would let two of them in.
        with _exclusive(self.folder / f"{shard.blake3[:2]}.lock"):
            if path.is_file() and path.stat().st_size == shard.size_bytes:
                return  # Another thread or process has downloaded it.
            partial, held = self._reserve(shard)
            with held:
                try:
                    download(partial)
                    os.fsync(held.fileno())
                    # Renaming must not hide the file from another process that counts sizes.
                    with _exclusive(self.folder / _SPACE_LOCK):
                        partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)

    def _reserve(self, shard: Shard) -> tuple[Path, IO[bytes]]:
        """Free space for a shard; return the file to download to, with a shared lock."""
        if shard.size_bytes > self.limit_bytes:
            raise self._full(shard, 0)
        partial = self.folder / f"{shard.blake3}.{shard.size_bytes}.{uuid4().hex}.tmp"
        give_up = time.monotonic() + _WAIT_FOR_SPACE_S
        while True:
            with _exclusive(self.folder / _SPACE_LOCK):
                held = self._evict(shard.size_bytes)
                if held + shard.size_bytes <= self.limit_bytes:
                    file = partial.open("x+b")
                    _share(file)
                    _flock(file, fcntl.LOCK_SH)
                    return partial, file
            # Space is freed when others finish reading or downloading.
            if time.monotonic() > give_up:
                raise self._full(shard, held)
            time.sleep(0.1)

    def _full(self, shard: Shard, held: int) -> UserError:
        return UserError(
            f"{self.folder}: {held:,} bytes are in use and {shard.name} needs {shard.size_bytes:,} more,"
            f" data.cache_gb = {self.limit_bytes / 1e9:g} allows {self.limit_bytes:,.0f}; raise it,"
            " or set data.cache to a folder that no other run uses"
        )

    def _evict(self, needed_bytes: int) -> int:
        """Remove least recently used files until the bytes fit; return the size of the rest."""
        files = []
        for path in self.folder.iterdir():
            if ours := _OURS.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime, path, int(ours["bytes"] or status.st_size)))
        held = sum(size_bytes for *_, size_bytes in files)
        for used, path, size_bytes in sorted(files):
            partial = path.suffix == ".tmp"
            old = time.time() - used > _LEFT_OVER_S
            if (partial and old) or held + needed_bytes > self.limit_bytes:
                held -= size_bytes * _remove_unused(path, without_lock=old or not partial)
        return held


def _remove_unused(path: Path, *, without_lock: bool) -> bool:
    """Remove an unlocked file; return whether it is gone."""
    try:
        # NFS needs write access for an exclusive lock.
        with path.open("r+b") as file:
            if not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) and not without_lock:
                return False
            path.unlink()
    except FileNotFoundError:
        # A vanished download is usually finished, under its final name.
        return path.suffix != ".tmp"
    # In use (BlockingIOError), or another user's.
    except OSError:
        return False
    return True


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with _open_lock(path) as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def _open_lock(path: Path) -> IO[bytes]:
    while True:
        try:
            # Without O_CREAT, which Linux refuses for another user's file in a folder with the sticky bit.
            return path.open("r+b")
        except FileNotFoundError:
            with suppress(FileExistsError):
                file = path.open("x+b")
                _share(file)
                return file
        except PermissionError:
            # Enough for a lock, except over NFS.
            return path.open("rb")


def _share(file: IO[bytes]) -> None:
    """Give a new file its folder's permissions, whatever the umask."""
    with suppress(OSError):
        os.fchmod(file.fileno(), stat.S_IMODE(Path(file.name).parent.stat().st_mode) & 0o666)


def _flock(file: IO[bytes], operation: int) -> bool:
    """Lock a file; False if its file system has no locks, BlockingIOError if LOCK_NB finds it locked."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
