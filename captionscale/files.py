"""Atomic files, bounded reads, scratch folders, and folders locked for one writer."""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryFile, gettempdir, mkdtemp
from typing import BinaryIO

import psutil
from blake3 import blake3
from filelock import FileLock, Timeout

from captionscale.errors import UserError
from captionscale.escape import for_terminal

LOCK = ".lock"
MB = 10**6
# Another prefix than of version 0.1, which did not lock a file within.
_SCRATCH = "captionscale-work-"
# With the ending of `mkdtemp`: a user's own folder is never removed.
_SCRATCH_NAME = re.compile(rf"{_SCRATCH}.+-[a-z0-9_]{{8}}")
_MAX_HOLDER = 200
_HOLDER = re.compile(r".*, process (\d{1,9}) on (\S+)")
_OWN_PIPE = re.compile(r"/dev/stdin|/(?:dev|proc/self)/fd/\d+")


class UnfitFileError(OSError):
    """A path is no regular file, or the file is larger than allowed."""


def open_file(path: Path) -> BufferedReader:
    """Open a regular file, or a pipe of this process such as a shell's `<(command)`, for reading.

    Raises:
        UnfitFileError: It is something else.
        OSError: It cannot be opened.
    """
    # Opening a named pipe would block until it has a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not (_OWN_PIPE.fullmatch(str(path)) and stat.S_ISFIFO(os.fstat(descriptor).st_mode)):
            _need_regular(descriptor, path)
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Path, max_bytes: int = MB) -> bytes:
    """Return the content of a file that `open_file` accepts, of at most `max_bytes`.

    Raises:
        UnfitFileError: It is larger, or no regular file.
        OSError: It cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size) if size <= max_bytes else b""
        # The file may grow, and files of the kernel report a size of 0.
        while size <= max_bytes and len(data) <= max_bytes and (more := file.read(MB)):
            data += more
    if (size := max(size, len(data))) > max_bytes:
        raise UnfitFileError(
            errno.EFBIG, f"at least {size:,} bytes, expected at most {max_bytes:,}", str(path)
        )
    return data


def append_lines(path: Path, *lines: bytes) -> None:
    """Append lines to a file, which is created if missing; a torn last line is ended first.

    Raises:
        UnfitFileError: It is no regular file.
        OSError: It cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        size = _need_regular(descriptor, path)
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        with os.fdopen(descriptor, "ab", closefd=False) as file:
            file.write(b"\n" * bool(torn) + b"".join(line + b"\n" for line in lines))
    finally:
        os.close(descriptor)


def _need_regular(descriptor: int, path: Path) -> int:
    """Return the size of an open regular file; refuse anything else."""
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise UnfitFileError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise UnfitFileError(errno.EINVAL, "Not a regular file", str(path))
    return status.st_size


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blake3_of(path: Path) -> str:
    """Return a large file's BLAKE3 in hexadecimal, as `b3sum` prints it.

    Source:
        O'Connor et al. 2020, "BLAKE3, one function, fast everywhere": as safe as SHA-256, three times faster.
    """
    hasher = blake3()
    # A memory map would be a little faster, but a failing disk or a shrinking file would kill the process.
    with open_file(path) as file:
        while chunk := file.raw.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only once it is complete and on disk.

    On any error the partial file is removed and an earlier file at `path` stays.

    Raises:
        UserError: The disk is full, or the folder is read-only.
    """
    # A file of this name was left by a killed process.
    partial = path.with_name(f".captionscale-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.tmp")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise not_writable(path, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Check before long work that a file can be written; neither it nor its folder is created.

    Raises:
        UserError: It is a folder, or its folder is read-only, full, or cannot be created.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a file; add the file's name")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise not_writable(path, error) from error


def not_writable(path: Path, error: OSError) -> UserError:
    """Return the error for a file or folder that cannot be written."""
    return UserError(
        f"{path}: cannot be written ({error.strerror}), expected a writable folder with free space;"
        " correct the path or its permissions, free the disk, or choose another place"
    )


@contextmanager
def temp_folder(name: str) -> Iterator[Path]:
    """Create a temporary folder and remove it at the end, together with those that killed processes left."""
    for other in Path(gettempdir()).glob(f"{_SCRATCH}*"):
        # The kernel releases the lock of a process that dies.
        with suppress(OSError):
            if _SCRATCH_NAME.fullmatch(other.name):
                with _lock_of(other):
                    rmtree(other, ignore_errors=True)
    while True:
        folder = Path(mkdtemp(prefix=f"{_SCRATCH}{name}-"))
        held = _lock_of(folder)
        # On a file system without locks, a folder left behind is never removed.
        with suppress(OSError):
            held.acquire(timeout=-1)
        try:
            # Another process may have removed it before it was locked.
            if folder.exists():
                yield folder
                return
        finally:
            rmtree(folder, ignore_errors=True)
            held.release()


def _lock_of(folder: Path) -> FileLock:
    # Without the fallback, which a killed process would leave locked.
    return FileLock(folder / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)


@contextmanager
def lock(folder: Path, who: str) -> Iterator[None]:
    """Hold a folder as its only writer; the kernel releases the lock if the process dies.

    Args:
        folder: Created if missing, and removed again if nothing was written into it.
        who: Command named to a process that is refused.

    Raises:
        UserError: Another process holds it.
    """
    made = not folder.exists()
    if not made and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path, held = folder / LOCK, _lock_of(folder)
    try:
        held.acquire()
        file = path.open("r+b", buffering=0)
    except Timeout:
        raise UserError(
            f"{folder}: in use by {lock_holder(folder) or 'another process'}, expected no other writer;"
            " wait for it, stop it, or choose another --out"
        ) from None
    except OSError as error:
        # An error of the lock itself names no file.
        if error.filename is not None:
            raise _no_lock(path, error) from None
        raise UserError(
            f"{folder}: its file system has no locks ({error.strerror}), expected one that has;"
            " mount it with flock, or choose another --out"
        ) from None
    try:
        with file:
            try:
                _need_regular(file.fileno(), path)
                file.truncate()
                os.write(file.fileno(), f"{who}, process {os.getpid()} on {os.uname().nodename}".encode())
            except UnfitFileError as error:
                raise _no_lock(path, error) from None
            except OSError as error:
                raise not_writable(path, error) from None
            try:
                yield
            finally:
                file.truncate(0)
                if made and [each.name for each in folder.iterdir()] == [LOCK]:
                    path.unlink()
                    with suppress(OSError):
                        folder.rmdir()
    finally:
        held.release()


def lock_holder(folder: Path) -> str:
    """Return who holds the lock of a folder: command, process and host; empty if nobody does.

    Raises:
        OSError: There is no lock, or it is no regular file.
    """
    with open_file(folder / LOCK) as file:
        return for_terminal(os.pread(file.fileno(), _MAX_HOLDER, 0).decode(errors="replace").strip())


def is_alive(holder: str) -> bool | None:
    """Return whether the process that `lock_holder` names exists; None if it is on another machine."""
    found = _HOLDER.fullmatch(holder)
    if found is None or found[2] != os.uname().nodename:
        return None
    return bool(psutil.pid_exists(int(found[1])))


def _no_lock(path: Path, error: OSError) -> UserError:
    found = "is a link" if error.errno == errno.ELOOP else f"cannot be a lock ({error.strerror})"
    return UserError(
        f"{path}: {found}, expected a file that this process may write;"
        " remove it, or make the folder writable"
    )
