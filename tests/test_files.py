import hashlib
import os
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path
from typing import BinaryIO

import pytest

from captionscale.errors import UserError
from captionscale.files import (
    LOCK,
    UnfitFileError,
    atomic_write,
    check_writable,
    lock,
    read_file,
    sha256_of,
    temp_folder,
)

HOLD = """
import sys
from pathlib import Path
from captionscale.files import lock
with lock(Path(sys.argv[1]), "captionscale pack"):
    print("held", flush=True)
    sys.stdin.read()
"""


def _write_half_and_raise(file: BinaryIO, error: type[BaseException]) -> None:
    file.write(b"half")
    raise error


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    with atomic_write(path) as file:
        file.write(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_failed_write_leaves_what_was_there_before(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    for name in ("a.bin", "new.bin"):
        with pytest.raises(error), atomic_write(tmp_path / name) as file:
            _write_half_and_raise(file, error)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"before"


def test_a_full_disk_leaves_what_was_there_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(ENOSPC, "No space left on device")

    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"), atomic_write(path) as file:
        file.write(b"half")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"before"


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    for data in (b"", b"abc", bytes(range(256)) * 5000):
        (tmp_path / "a").write_bytes(data)
        assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_what_a_shell_pipes_in_is_read_to_its_end_and_its_bound(folder: str) -> None:
    for size, max_bytes in ((1000, 1000), (1001, 1000)):
        reader, writer = os.pipe()
        os.write(writer, bytes(size))
        os.close(writer)
        try:
            if size <= max_bytes:
                assert read_file(Path(folder, str(reader)), max_bytes) == bytes(size)
            else:
                with pytest.raises(UnfitFileError, match="at most 1,000"):
                    read_file(Path(folder, str(reader)), max_bytes)
        finally:
            os.close(reader)


def test_one_writer_at_a_time_has_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "if need be"
    with lock(folder, "captionscale train"):
        with pytest.raises(UserError, match=f"in use by captionscale train, process {os.getpid()} on"):
            lock(folder, "captionscale pack").__enter__()
        # The one who was refused has not let the other go.
        with pytest.raises(UserError, match="in use by captionscale train"):
            lock(folder, "captionscale pack").__enter__()
    with lock(folder, "captionscale pack"):
        pass


def test_a_folder_into_which_nothing_came_is_removed_and_one_that_was_there_is_not(tmp_path: Path) -> None:
    with lock(tmp_path / "made", "captionscale pack"):
        pass
    assert not (tmp_path / "made").exists()
    with lock(tmp_path / "filled", "captionscale pack"):
        (tmp_path / "filled" / "file").touch()
    assert (tmp_path / "filled" / LOCK).read_bytes() == b""
    with lock(tmp_path, "captionscale pack"):
        pass
    assert tmp_path.exists()


def test_an_error_lets_a_folder_go(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lock(tmp_path, "captionscale train"):
        raise KeyboardInterrupt
    assert (tmp_path / LOCK).read_bytes() == b""
    with lock(tmp_path, "captionscale pack"):
        pass


def test_another_process_is_told_by_name_and_lets_a_folder_go_when_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by captionscale pack, process {other.pid} on"):
            lock(tmp_path, "captionscale train").__enter__()
        other.kill()
        other.wait()
        with lock(tmp_path, "captionscale train"):
            pass


def test_whether_a_file_can_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for good in (file, tmp_path / "new" / "deep" / "file", Path("relative.bin")):
        check_writable(good)
    for bad in (tmp_path, file / "x", file / "x" / "y", tmp_path / "nowhere" / "x", Path("/proc/x/y")):
        with pytest.raises(
            UserError, match=r"is a folder, .*; add the file's|cannot be written \(.*; correct the"
        ):
            check_writable(bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]
    assert file.read_bytes() == b"before"
    assert not Path("relative.bin").exists()


def test_a_killed_processs_scratch_folder_is_removed_by_the_next_one_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hold = HOLD.replace("import lock", "import temp_folder").replace(
        'lock(Path(sys.argv[1]), "captionscale pack")', "temp_folder('x') as folder"
    )
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        (theirs,) = tmp_path.iterdir()
        (theirs / "file").write_text("")
        with temp_folder("y") as own:
            assert {*tmp_path.iterdir()} == {own, theirs}
            with temp_folder("z"):
                assert own.exists()
        assert [*tmp_path.iterdir()] == [theirs]
        process.kill()
        process.wait()
    with temp_folder("y") as own:
        assert [*tmp_path.iterdir()] == [own]
    assert not [*tmp_path.iterdir()]
