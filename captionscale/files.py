"""Files that are whole or absent, and folders that one process writes."""

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryFile, gettempdir, mkdtemp
from typing import BinaryIO

from blake3 import blake3

from captionscale.errors import UserError
from captionscale.escape import for_terminal

LOCK = ".lock"
MB = 10**6
_SCRATCH = "captionscale-scratch-"
# As `mkdtemp` ends them: a user's own folder has another name.
_SCRATCH_NAME = re.compile(rf"{_SCRATCH}.+-[a-z0-9_]{{8}}")
_MAX_HOLDER = 200
_OWN_PIPE = re.compile(r"/dev/stdin|/(?:dev|proc/self)/fd/\d+")


class UnfitFileError(OSError):
    """A path is a folder, a pipe or a device, or a file larger than its kind may be."""


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; nothing else is opened, or waited for, but this process's own pipes.

    Raises:
        UnfitFileError: It is something else.
        OSError: It cannot be opened.
    """
    # A named pipe would wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # A shell's `<(command)` has its writer already.
        if not (_OWN_PIPE.fullmatch(str(path)) and stat.S_ISFIFO(os.fstat(descriptor).st_mode)):
            _need_regular(descriptor, path)
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Path, max_bytes: int = MB) -> bytes:
    """Return the content of a file, as `open_file` opens it, that is no larger than its kind may be.

    Raises:
        UnfitFileError: It is larger, or no file that may be opened.
        OSError: It cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size) if size <= max_bytes else b""
        # It may grow, and files of the system say 0 and hold more.
        while size <= max_bytes and len(data) <= max_bytes and (more := file.read(MB)):
            data += more
    if (size := max(size, len(data))) > max_bytes:
        raise UnfitFileError(
            errno.EFBIG, f"at least {size:,} bytes, expected at most {max_bytes:,}", str(path)
        )
    return data


def append_lines(path: Path, *lines: bytes) -> None:
    """Add lines to a file, which is made if need be; never to the torn line of a killed process.

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
    """Return the size of what is open; refuse all but a regular file."""
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
        O'Connor et al. 2020, "BLAKE3, one function, fast everywhere": as safe as SHA-256, at thrice its pace.
    """
    hasher = blake3()
    # A map would be a little faster, but kills the process where a disk fails or the file shrinks.
    with open_file(path) as file:
        while chunk := file.raw.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def cpu_count() -> int:
    """Return how many cores this process may use, which in a job is fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it is complete and on the disk.

    On any error the partial file is removed and what stood at `path` before stays.

    Raises:
        UserError: The disk is full, or the folder is read-only.
    """
    # No user's file has this name: what is there is the rest of a killed process.
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
    """Prove, before long work, that a file can be written at its end; nothing is made, not even its folder.

    Raises:
        UserError: It is a folder, or its folder is read-only, full, or cannot be made.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, wanted a place for a file; add the file's name")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        # It has no name, or loses it at once.
        with TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise not_writable(path, error) from error


def not_writable(path: Path, error: OSError) -> UserError:
    """Return what to tell of a file or folder that the system did not let us write."""
    return UserError(
        f"{path}: cannot be written ({error.strerror}), wanted a writable folder with free space;"
        " correct the path or its rights, free the disk, or take another place"
    )


@contextmanager
def temp_folder(name: str) -> Iterator[Path]:
    """Make a temporary folder, and remove it; first those of processes that were killed are removed.

    Args:
        name: Part of the folder's.
    """
    for other in Path(gettempdir()).glob(f"{_SCRATCH}*"):
        if not _SCRATCH_NAME.fullmatch(other.name):
            continue
        # Whoever uses it holds its lock, of which the system lets go when that process dies.
        with suppress(OSError), _locked(other, fcntl.LOCK_EX | fcntl.LOCK_NB):
            rmtree(other, ignore_errors=True)
    while True:
        folder = Path(mkdtemp(prefix=f"{_SCRATCH}{name}-"))
        with ExitStack() as held:
            # Some file systems have no locks: what is left there stays.
            with suppress(OSError):
                held.enter_context(_locked(folder, fcntl.LOCK_EX))
            # Another process may have removed it before it was locked.
            if folder.exists():
                try:
                    yield folder
                finally:
                    rmtree(folder, ignore_errors=True)
                return


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, how)
        yield
    finally:
        os.close(opened)


@contextmanager
def lock(folder: Path, who: str) -> Iterator[None]:
    """Be the only process that writes into a folder; the system lets go of it if the process dies.

    Args:
        folder: Made if need be, and removed again if nothing came into it.
        who: Command that the next one is told of.

    Raises:
        UserError: Another process holds it.
    """
    made = not folder.exists()
    if not made and not folder.is_dir():
        raise UserError(f"{folder}: is a file, wanted a folder; take another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        # Not through a link: what it leads to would be emptied.
        how = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, how, 0o666)
    except OSError as error:
        raise _no_lock(path, error) from None
    try:
        try:
            _need_regular(descriptor, path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: in use by {_holder(descriptor) or 'another process'}; wanted to be the only"
                " writer; wait for it, stop it, or take another --out"
            ) from None
        except UnfitFileError as error:
            raise _no_lock(path, error) from None
        except OSError as error:
            raise UserError(
                f"{folder}: its file system has no locks ({error.strerror}), wanted one that has;"
                " mount it with flock, or take --out elsewhere"
            ) from None
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{who}, process {os.getpid()} on {os.uname().nodename}".encode())
        except OSError as error:
            raise not_writable(path, error) from None
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
            if made and [each.name for each in folder.iterdir()] == [LOCK]:
                path.unlink()
                with suppress(OSError):
                    folder.rmdir()
    finally:
        os.close(descriptor)


def lock_holder(folder: Path) -> str:
    """Return what the process that writes into a folder says of itself; nothing if it says nothing.

    Raises:
        OSError: There is no lock, or it is no regular file.
    """
    with open_file(folder / LOCK) as file:
        return _holder(file.fileno())


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, _MAX_HOLDER, 0).decode(errors="replace")
    return for_terminal(text.strip())


def _no_lock(path: Path, error: OSError) -> UserError:
    found = "is a link" if error.errno == errno.ELOOP else f"cannot be a lock ({error.strerror})"
    return UserError(
        f"{path}: {found}, expected a file that this process may write;"
        " remove it, or make the folder writable"
    )
