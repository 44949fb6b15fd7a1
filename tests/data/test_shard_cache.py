import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from blake3 import blake3

from captionscale.data import shard_cache
from captionscale.data.manifest import Shard
from captionscale.data.shard_cache import ShardCache
from captionscale.errors import UserError

SIZE = 1000
CONTENT = [np.random.default_rng(number).bytes(SIZE) for number in range(8)]
# The name says nothing: all are called alike.
SHARDS = [Shard("train-00000.tar", SIZE, blake3(data).hexdigest(), 1) for data in CONTENT]

DIE_IN_A_DOWNLOAD = """
import os, sys
from pathlib import Path
from captionscale.data.shard_cache import ShardCache
from captionscale.data.manifest import Shard

def download(path):
    path.write_bytes(b"half")
    print("half", flush=True)
    sys.stdin.read()

with ShardCache(Path(sys.argv[1]), 1e-3).open(Shard("train-00000.tar", 1000, sys.argv[2], 1), download):
    pass
"""


class Origin:
    """Where shards come from; counts what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def of(self, number: int) -> Callable[[Path], None]:
        def download(path: Path) -> None:
            self.asked.append(number)
            path.write_bytes(CONTENT[number])

        return download


@pytest.fixture
def origin() -> Origin:
    return Origin()


def cache_of(folder: Path, shards: float) -> ShardCache:
    """A cache for so many shards."""
    return ShardCache(folder, shards * SIZE / 1e9)


def read(cache: ShardCache, number: int, download: Callable[[Path], None]) -> bytes:
    with cache.open(SHARDS[number], download) as file:
        return os.pread(file.fileno(), 2 * SIZE, 0)


def held(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_shard_is_downloaded_once_and_named_by_its_hash(tmp_path: Path, origin: Origin) -> None:
    # A past bug of webdataset (its issue 238): one name for all cached shards, so that training saw one.
    for _ in range(2):
        cache = cache_of(tmp_path / "made" / "if need be", 8)
        for number in range(8):
            assert read(cache, number, origin.of(number)) == CONTENT[number]
    assert origin.asked == list(range(8))
    assert set(held(cache.folder)) == {f"{shard.blake3}.tar" for shard in SHARDS}


def test_threads_that_read_one_shard_download_it_once(tmp_path: Path, origin: Origin) -> None:
    cache = cache_of(tmp_path, 8)

    def slow(path: Path) -> None:
        time.sleep(0.1)
        origin.of(0)(path)

    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(read, cache, 0, slow) for _ in range(8)]
    assert {each.result() for each in reads} == {CONTENT[0]}
    assert origin.asked == [0]


def test_the_bound_holds_whatever_is_read_and_the_least_recently_used_make_way(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    # File systems may count time in milliseconds; what is used here follows closer.
    monkeypatch.setattr(shard_cache, "_SAME_USE_S", -1.0)
    clock = iter(range(1, 10**6))
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda path: utime(path, (0, next(clock))))
    cache = cache_of(tmp_path, 3.5)
    recent: list[int] = []
    for number in np.random.default_rng(0).integers(8, size=300).tolist():
        before = len(origin.asked)
        assert read(cache, number, origin.of(number)) == CONTENT[number]
        assert (len(origin.asked) == before) == (number in recent[-3:])
        recent = [each for each in recent if each != number] + [number]
        assert set(held(tmp_path)) == {f"{SHARDS[each].blake3}.tar" for each in recent[-3:]}


def test_threads_keep_to_the_size_of_one_shard(tmp_path: Path, origin: Origin) -> None:
    cache = cache_of(tmp_path, 1)

    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(read, cache, number, origin.of(number)) for number in [0, 1, 2, 3] * 5]
    assert [each.result() for each in reads] == CONTENT[:4] * 5
    assert sum(held(tmp_path).values()) == SIZE


def test_a_shard_in_use_is_not_removed_and_the_error_names_bound_and_need(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "_WAIT_FOR_SPACE_S", 0.3)
    cache = cache_of(tmp_path, 2)
    expected = (
        rf"{tmp_path}: 2,000 bytes are in use and train-00000.tar needs 1,000 more,"
        r" data.cache_gb = 2e-06 allows 2,000; raise it"
    )
    with cache.open(SHARDS[1], origin.of(1)) as one:
        with cache.open(SHARDS[0], origin.of(0)), pytest.raises(UserError, match=expected):
            read(cache_of(tmp_path, 2), 2, origin.of(2))
        assert read(cache, 2, origin.of(2)) == CONTENT[2]
        assert one.read() == CONTENT[1]
    assert set(held(tmp_path)) == {f"{SHARDS[number].blake3}.tar" for number in (1, 2)}


def test_a_full_cache_is_waited_for(tmp_path: Path, origin: Origin) -> None:
    cache = cache_of(tmp_path, 1)
    with ThreadPoolExecutor(1) as pool:
        with cache.open(SHARDS[0], origin.of(0)):
            waiting = pool.submit(read, cache, 1, origin.of(1))
            time.sleep(0.3)
            assert not waiting.done()
        assert waiting.result() == CONTENT[1]
    assert set(held(tmp_path)) == {f"{SHARDS[1].blake3}.tar"}


def test_a_bound_smaller_than_a_shard_is_refused_at_once(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(cache_of(tmp_path, 1), 1, origin.of(1))
    monkeypatch.setattr(shard_cache, "time", None)
    with pytest.raises(UserError, match=r"needs 1,000 more, data.cache_gb = 9e-07 allows 900"):
        read(cache_of(tmp_path, 0.9), 0, origin.of(0))
    assert origin.asked == [1]
    # Nothing made way for what cannot come.
    assert set(held(tmp_path)) == {f"{SHARDS[1].blake3}.tar"}


@pytest.mark.parametrize("damage", [b"", CONTENT[0][:-1], CONTENT[0] + b"\0"])
def test_a_shard_of_another_size_is_downloaded_again(tmp_path: Path, origin: Origin, damage: bytes) -> None:
    cache = cache_of(tmp_path, 8)
    read(cache, 0, origin.of(0))
    cache.path(SHARDS[0]).write_bytes(damage)
    assert read(cache, 0, origin.of(0)) == CONTENT[0]
    assert origin.asked == [0, 0]


def test_a_removed_shard_or_folder_is_downloaded_again(tmp_path: Path, origin: Origin) -> None:
    cache = cache_of(tmp_path / "cache", 8)
    with cache.open(SHARDS[0], origin.of(0)) as first:
        shutil.rmtree(cache.folder)
        assert read(cache, 0, origin.of(0)) == first.read() == CONTENT[0]
    assert origin.asked == [0, 0]


def test_foreign_files_are_kept(tmp_path: Path, origin: Origin) -> None:
    others = ["train-00000.tar", "notes.tmp", f"{SHARDS[0].blake3}.tar.bak", f"{'A' * 64}.tar"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(SIZE))
        os.utime(tmp_path / name, (0, 0))
    cache = cache_of(tmp_path, 1)
    for number in range(8):
        read(cache, number, origin.of(number))
    assert set(held(tmp_path)) == {*others, f"{SHARDS[-1].blake3}.tar"}


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space")])
def test_a_failed_download_leaves_nothing(tmp_path: Path, origin: Origin, error: BaseException) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    cache = cache_of(tmp_path, 8)
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        read(cache, 0, fail)
    assert held(tmp_path) == {}
    if isinstance(error, OSError):
        expected = "No space; expected a folder that can keep train-00000.tar (1,000 bytes); free the disk"
        assert str(caught.value).startswith(f"{tmp_path}: {expected}")
    assert read(cache, 0, origin.of(0)) == CONTENT[0]


def test_a_killed_download_blocks_no_other_and_a_running_one_is_not_removed(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "_WAIT_FOR_SPACE_S", 0.3)
    command = [sys.executable, "-c", DIE_IN_A_DOWNLOAD, str(tmp_path), SHARDS[0].blake3]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"half\n"
        assert list(held(tmp_path).values()) == [4]
        # What is on its way counts whole, though only four bytes have come.
        with pytest.raises(UserError, match="1,000 bytes are in use"):
            read(cache_of(tmp_path, 1.5), 1, origin.of(1))
        other.kill()
        other.wait()
    assert len(held(tmp_path)) == 1
    for number in (0, 1):
        cache = cache_of(tmp_path, 1)
        assert read(cache, number, origin.of(number)) == CONTENT[number]
    assert set(held(tmp_path)) == {f"{SHARDS[1].blake3}.tar"}


@pytest.mark.parametrize("locks", [True, False])
def test_old_left_overs_are_removed_even_with_free_space(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        without_locks(monkeypatch)
    names = [f"{SHARDS[0].blake3}.{SIZE}.{letter * 32}.tmp" for letter in "ab"]
    for name, age_s in zip(names, (60, 7200), strict=True):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    read(cache_of(tmp_path, 8), 1, origin.of(1))
    assert set(held(tmp_path)) == {names[0], f"{SHARDS[1].blake3}.tar"}


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_the_limit_is_kept_and_a_recent_download_is_not_removed(
    tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    running = tmp_path / f"{SHARDS[7].blake3}.{SIZE}.{'a' * 32}.tmp"
    running.write_bytes(b"half")
    cache = cache_of(tmp_path, 3)
    for number in [0, 1, 2, 3, 0, 1]:
        assert read(cache, number, origin.of(number)) == CONTENT[number]
        assert sum(held(tmp_path).values()) <= 2 * SIZE + 4
    assert running.exists()


def test_a_file_or_a_folder_in_the_way_is_reported(tmp_path: Path, origin: Origin) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"/file.*: Not a directory; expected a folder that can keep .* data.cache"
    ):
        read(cache_of(tmp_path / "file", 8), 0, origin.of(0))
    with pytest.raises(UserError, match=r"Not a directory; expected a folder that can keep"):
        read(cache_of(tmp_path / "file" / "inside", 8), 0, origin.of(0))
    (tmp_path / f"{SHARDS[0].blake3}.tar").mkdir()
    with pytest.raises(UserError, match=r"Is a directory; expected a folder that can keep"):
        read(cache_of(tmp_path, 8), 0, origin.of(0))


@pytest.mark.parametrize("name", ["", "../../" + "a" * 58, "A" * 64, "a" * 64 + "\n", "ä" * 64])
def test_a_hash_from_a_damaged_manifest_is_no_path(tmp_path: Path, origin: Origin, name: str) -> None:
    with pytest.raises(UserError, match=r"^train-00000.tar: blake3 .* in the manifest is not one;"):
        cache_of(tmp_path, 8).open(Shard("train-00000.tar", SIZE, name, 1), origin.of(0)).__enter__()
    assert held(tmp_path) == {}


def test_the_folder_is_the_given_one_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAPTIONSCALE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache(None, 1.0).folder == tmp_path / ".cache" / "captionscale"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ShardCache(None, 1.0).folder == tmp_path / "xdg" / "captionscale"
    monkeypatch.setenv("CAPTIONSCALE_CACHE", "~/own")
    assert ShardCache(None, 1.0).folder == tmp_path / "own"
    assert ShardCache(tmp_path / "given", 1.0).folder == tmp_path / "given"
    with pytest.raises(
        UserError, match=r"~nobody-of-this-name/x: no such home, expected a folder for shards; set data.cache"
    ):
        ShardCache(Path("~nobody-of-this-name/x"), 1.0)


@pytest.fixture
def meeting_place() -> Iterator[Path]:
    """A folder that other users can reach, which pytest's own are not."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_user(user: int, group: int, action: Callable[[], object]) -> int:
    """Do something as another user with the strictest umask; return 1 after a `UserError`, else 0."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.umask(0o077)
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
            action()
            code = 0
        except UserError:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")
@pytest.mark.parametrize("mode", [0o2770, 0o777, 0o1777])
def test_users_who_may_write_the_folder_share_it(
    meeting_place: Path, origin: Origin, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A past bug: lock files had the mode 644, so that nobody but the first user could bring a shard.
    folder = meeting_place / "cache"
    folder.mkdir()
    os.chown(folder, 0, 4000)
    folder.chmod(mode)
    cache = cache_of(folder, 2)
    for user, number in ((4001, 0), (4002, 0), (4002, 1)):
        assert as_user(user, 4000, lambda number=number: read(cache, number, origin.of(number))) == 0
    assert {path.name: path.stat().st_uid for path in folder.glob("*.tar")} == {
        f"{SHARDS[0].blake3}.tar": 4001,
        f"{SHARDS[1].blake3}.tar": 4002,
    }
    # With the sticky bit nobody removes what is another's; the bound holds nonetheless.
    monkeypatch.setattr(shard_cache, "_WAIT_FOR_SPACE_S", 0.1)
    other = as_user(4001, 4000, lambda: read(cache_of(folder, 1), 2, origin.of(2)))
    assert (other, sum(held(folder).values())) == (1 if mode & 0o1000 else 0, SIZE)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")
def test_locks_that_an_older_version_made_are_used_by_others(meeting_place: Path, origin: Origin) -> None:
    folder = meeting_place / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    for name in ("room.lock", f"{SHARDS[0].blake3[:2]}.lock"):
        (folder / name).touch()
        (folder / name).chmod(0o644)
    cache = cache_of(folder, 2)
    assert as_user(4001, 4000, lambda: read(cache, 0, origin.of(0))) == 0
    with (folder / "room.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o700, 0o600), (0o755, 0o644), (0o775, 0o664)])
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_files_have_the_permissions_of_the_folder(
    tmp_path: Path, origin: Origin, folder_mode: int, file_mode: int, umask: int
) -> None:
    tmp_path.chmod(folder_mode)
    before = os.umask(umask)
    try:
        read(cache_of(tmp_path, 2), 0, origin.of(0))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {file_mode}
