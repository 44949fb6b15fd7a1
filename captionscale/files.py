"""Files that are whole or absent, and folders that one process writes."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from captionscale.errors import UserError

LOCK = ".lock"


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blake3_of(path: Path) -> str:
    """Return a large file's BLAKE3 in hexadecimal, as `b3sum` prints it.

    Source:
        O'Connor et al. 2020, "BLAKE3, one function, fast everywhere": as safe as SHA-256, at thrice its pace.
    """
    hasher = blake3()
    # A map would be a little faster, but kills the process where a disk fails or the file shrinks.
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def cores() -> int:
    """Return how many cores this process may use, which in a job is fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it is complete and on the disk.

    On any error the partial file is removed and what stood at `path` before stays.

    Raises:
        UserError: The disk is full, or the folder is read-only.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}), wanted a writable folder with free space;"
            " free the disk or take another place"
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{folder}: in use by {holder}; wanted to be the only writer;"
                " wait for it, stop it, or take another --out"
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder}: its file system has no locks ({error.strerror}), wanted one that has;"
                " mount it with flock, or take --out elsewhere"
            ) from None
        file.truncate(0)
        file.write(f"{who}, process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                with suppress(OSError):
                    folder.rmdir()
