"""A folder of downloaded shards that data sets, processes and nodes share, and that keeps to its bound.

A shard is named by its BLAKE3, so that two never meet under one name. A file lock says that it is in use:
readers share the lock, and only who gets it alone may remove the file. The system lets go of the locks of a
process that dies. On a file system without locks a shard may be downloaded twice, which costs bandwidth only.
Users share a folder that all of them may write: its files have its rights, not those of their maker's umask.
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

# A download says in its name how much room it will take: the file itself grows only while it comes.
_OURS = re.compile(r"[0-9a-f]{64}(?:\.tar|\.(?P<bytes>\d+)\.[0-9a-f]{32}\.tmp)")
_BLAKE3 = re.compile(r"[0-9a-f]{64}")
_ROOM = "room.lock"
_LEFT_OVER_S = 3600
_WAIT_FOR_ROOM_S = 600.0
_SAME_USE_S = 10.0


class ShardCache:
    """Shards that came from elsewhere, as local files; threads and forks may share it."""

    def __init__(self, folder: Path | None, limit_gb: float):
        """Name the folder; it is made with the first shard.

        Args:
            folder: None: `$CAPTIONSCALE_CACHE`, else `captionscale` in `$XDG_CACHE_HOME` or `~/.cache`.
            limit_gb: What it may hold at most, in 10^9 bytes.

        Raises:
            UserError: The folder starts with a home that nobody has.
        """
        place = folder or Path(os.environ.get("CAPTIONSCALE_CACHE") or _default())
        try:
            self.folder = place.expanduser().absolute()
        except RuntimeError:
            raise UserError(
                f"{place}: no such home, wanted a folder for shards; set data.cache or CAPTIONSCALE_CACHE"
            ) from None
        self.limit_bytes = limit_gb * 1e9

    def __str__(self) -> str:
        return f"{self.folder} ({self.limit_bytes / 1e9:g} GB at most)"

    @contextmanager
    def open(self, shard: Shard, download: Callable[[Path], None]) -> Iterator[IO[bytes]]:
        """Open a shard, bringing it if it is not here; nobody removes it meanwhile.

        Keep it open for a read, not for longer: a process that waits for others must not hold the room that
        they wait for. The size is compared at each opening, the hash once, after the download; `captionscale
        verify` compares it again.

        Args:
            shard: Which.
            download: Writes the shard, proven whole, to the path that it is given.

        Raises:
            UserError: The download fails, the folder is not writable, or there is no room.
        """
        try:
            while (file := self._here(shard)) is None:
                self._bring(shard, download)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: {error.strerror or error}; wanted a folder that can keep"
                f" {shard.name} ({shard.size_bytes:,} bytes); free the disk, correct the rights, or set"
                " data.cache or CAPTIONSCALE_CACHE to another folder"
            ) from None
        with file:
            yield file

    def path(self, shard: Shard) -> Path:
        """Return where a shard is, if it is here."""
        if not _BLAKE3.fullmatch(shard.blake3):
            raise UserError(f"{shard.name}: blake3 {shard.blake3!r:.80} in the manifest is not one; {CURE}")
        return self.folder / f"{shard.blake3}.tar"

    def _here(self, shard: Shard) -> IO[bytes] | None:
        """Open a shard that is here and of the right size, locked as one in use."""
        path = self.path(shard)
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        _flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        # Nothing by this name: it was removed between the opening and the lock.
        if status.st_size != shard.size_bytes or not path.exists():
            file.close()
            return None
        if time.time() - status.st_mtime > _SAME_USE_S:
            # A cache that somebody else filled may be read-only.
            with suppress(OSError):
                os.utime(path)
        return file

    def _bring(self, shard: Shard, download: Callable[[Path], None]) -> None:
        path = self.path(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        # 256 lock files, which stay: to remove one that others wait for would let two of them in.
        with _alone(self.folder / f"{shard.blake3[:2]}.lock"):
            if path.is_file() and path.stat().st_size == shard.size_bytes:
                return  # Another thread or process has brought it meanwhile.
            partial, held = self._reserve(shard)
            with held:
                try:
                    download(partial)
                    os.fsync(held.fileno())
                    # Who counts what is here must not miss what changes its name meanwhile.
                    with _alone(self.folder / _ROOM):
                        partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)

    def _reserve(self, shard: Shard) -> tuple[Path, IO[bytes]]:
        """Make room for a shard; return the file to download to, locked as one in use."""
        if shard.size_bytes > self.limit_bytes:
            raise self._no_room(shard, 0)
        partial = self.folder / f"{shard.blake3}.{shard.size_bytes}.{uuid4().hex}.tmp"
        give_up = time.monotonic() + _WAIT_FOR_ROOM_S
        while True:
            with _alone(self.folder / _ROOM):
                held = self._make_room(shard.size_bytes)
                if held + shard.size_bytes <= self.limit_bytes:
                    file = partial.open("x+b")
                    _share(file)
                    _flock(file, fcntl.LOCK_SH)
                    return partial, file
            # Others let go when they have read, or when their download is whole.
            if time.monotonic() > give_up:
                raise self._no_room(shard, held)
            time.sleep(0.1)

    def _no_room(self, shard: Shard, held: int) -> UserError:
        return UserError(
            f"{self.folder}: {held:,} bytes are in use and {shard.name} needs {shard.size_bytes:,} more,"
            f" data.cache_gb = {self.limit_bytes / 1e9:g} allows {self.limit_bytes:,.0f}; raise it,"
            " or set data.cache to a folder that no other run uses"
        )

    def _make_room(self, wanted_bytes: int) -> int:
        """Remove the least recently used until so many bytes fit; return how many the rest holds."""
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
            if (partial and old) or held + wanted_bytes > self.limit_bytes:
                held -= size_bytes * _remove_unused(path, without_lock=old or not partial)
        return held


def _default() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "captionscale"


def _remove_unused(path: Path, *, without_lock: bool) -> bool:
    """Remove a file that nobody has locked; whether it is gone."""
    try:
        # For writing: over NFS only such a file can be locked alone.
        with path.open("r+b") as file:
            if not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) and not without_lock:
                return False
            path.unlink()
    except FileNotFoundError:
        # A download that is not there any more is mostly whole, and still here under its final name.
        return path.suffix != ".tmp"
    # In use (BlockingIOError), or another user's.
    except OSError:
        return False
    return True


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with _open_lock(path) as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def _open_lock(path: Path) -> IO[bytes]:
    """Open a lock file, made if need be.

    An existing one is not opened with O_CREAT: in a folder with the sticky bit, Linux refuses that for the
    file of another user.
    """
    while True:
        try:
            return path.open("r+b")
        except FileNotFoundError:
            with suppress(FileExistsError):
                file = path.open("x+b")
                _share(file)
                return file
        except PermissionError:
            # Enough to lock it, but over NFS.
            return path.open("rb")


def _share(file: IO[bytes]) -> None:
    """Let those use a new file who may use its folder, whatever the umask."""
    with suppress(OSError):
        os.fchmod(file.fileno(), stat.S_IMODE(Path(file.name).parent.stat().st_mode) & 0o666)


def _flock(file: IO[bytes], operation: int) -> bool:
    """Lock a file; False if its file system has no locks.

    Raises:
        BlockingIOError: It is locked, and the operation does not wait.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
