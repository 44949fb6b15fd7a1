import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from captionscale import progress
from captionscale.data import download, storage
from captionscale.data.manifest import Shard
from captionscale.data.storage import LocalStorage, RemoteStorage, open_storage
from captionscale.errors import UserError

SIZE = 200_000
CONTENT = [np.random.default_rng(number).bytes(SIZE) for number in range(4)]
SHARDS = [
    Shard(f"train-{number:05d}.tar", SIZE, blake3(data).hexdigest(), 1) for number, data in enumerate(CONTENT)
]

READ = """
import signal, sys
from pathlib import Path
from captionscale.data.manifest import Shard
from captionscale.data.storage import open_storage

# What a shell starts in the background ignores Ctrl-C, and so would we.
signal.signal(signal.SIGINT, signal.default_int_handler)
url, cache, gb, order, *names = sys.argv[1:]
place = open_storage(url, Path(cache), float(gb))
shards = [Shard(f"train-{number:05d}.tar", 200_000, name, 1) for number, name in enumerate(names)]
for number in map(int, order.split(",")):
    for offset in (0, 150_000):
        sys.stdout.buffer.write(place.pread(shards[number], offset, 10))
    sys.stdout.flush()
"""


class Server(ThreadingHTTPServer):
    """Gives the files of a folder over HTTP, in configurable ways."""

    daemon_threads = True
    # A client that leaves in the middle is no news.
    handle_error = lambda *_: None  # noqa: E731

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/coco/{shard.name}": data for shard, data in zip(SHARDS, CONTENT, strict=True)}
        self.files["/coco/manifest.json"] = b"{}"
        self.asked: Counter[str] = Counter()
        self.faults: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/coco"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        fault = self.server.faults.pop(0) if self.server.faults else ""
        data = self.server.files.get(self.path)
        if fault.isdigit() or data is None:
            self.send_error(int(fault or 404))
            return
        if fault == "login" and self.headers["Authorization"] is None:
            self.send_error(401)
            return
        if fault == "silent":
            time.sleep(3)
            return
        if fault == "reset":
            # With nothing to linger for, closing resets.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "flipped":
            data = data[:1234] + bytes([data[1234] ^ 1]) + data[1235:]
        elif fault == "truncated":
            data = data[: len(data) // 2]
        if fault == "slow":
            for start in range(0, len(data), 10_000):
                self.wfile.write(data[start : start + 10_000])
                self.wfile.flush()
                time.sleep(0.3)
        else:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "_WAITS_S", (0.01, 0.01, 0.01))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(b"{}")
    for shard, data in zip(SHARDS, CONTENT, strict=True):
        (folder / shard.name).write_bytes(data)
    return folder


def cached(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"} if folder.exists() else set()


def prove(place: storage.Storage) -> None:
    """All bytes, by many threads, and what is whole or missing."""
    assert place.fetch("manifest.json") == b"{}"
    with pytest.raises(FileNotFoundError):
        place.fetch("train.index.npy")
    reads = np.random.default_rng(0).integers([0, 0, 0], [4, SIZE, 999], size=(300, 3)).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda read: place.pread(SHARDS[read[0]], *read[1:]), reads))
    assert found == [CONTENT[number][offset : offset + size] for number, offset, size in reads]
    assert place.pread(SHARDS[0], SIZE - 3, 10) == CONTENT[0][-3:]
    for shard, data in zip(SHARDS, CONTENT, strict=True):
        place.check_size(shard)
        with place.local_path(shard) as path:
            assert path.read_bytes() == data


# ---- a folder


def test_a_folder_is_read_where_it_is(folder: Path) -> None:
    for where in (str(folder), f"file://{folder}", os.path.relpath(folder)):
        place = open_storage(where)
        assert isinstance(place, LocalStorage)
        prove(place)


def test_a_file_stays_open_for_the_thread_that_reads_it_whatever_others_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A past bug: two threads opened one file, and the first to come lost its descriptor before it had read.
    monkeypatch.setattr(storage, "_MAX_OPEN_SHARDS", 1)
    place = open_storage(str(folder))
    numbers = np.random.default_rng(0).integers(4, size=3000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: place.pread(SHARDS[number], 100, 8), numbers))
    assert found == [CONTENT[number][100:108] for number in numbers]


def test_a_shard_that_is_missing_of_another_size_or_not_a_file_is_refused(folder: Path) -> None:
    place = open_storage(str(folder))
    path = folder / SHARDS[0].name
    path.write_bytes(b"half")
    with pytest.raises(UserError, match=rf"{path}: 4 bytes, manifest says 200,000 bytes; copy it again"):
        place.check_size(SHARDS[0])
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: missing, manifest says 200,000 bytes"):
        place.check_size(SHARDS[0])
    with pytest.raises(UserError, match=rf"{path}: No such file or directory, expected to read it; copy it"):
        place.pread(SHARDS[0], 0, 1)
    path.mkdir()
    with pytest.raises(UserError, match=rf"{path}: missing"):
        place.check_size(SHARDS[0])
    with pytest.raises(UserError, match=rf"{path}: Is a directory at byte 0, expected 1 bytes"):
        place.pread(SHARDS[0], 0, 1)


# ---- HTTP


def test_a_slow_download_shows_progress_on_the_first_rank_only(
    server: Server, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SHORT_S", 0.0)
    place = open_storage(server.url, tmp_path / "cache")
    place.pread(SHARDS[0], 0, 1)
    assert capsys.readouterr().err == f"downloading {server.url}/train-00000.tar, MB 1/1  0 s left\n"
    monkeypatch.setenv("RANK", "1")
    place.pread(SHARDS[1], 0, 1)
    assert capsys.readouterr().err == ""


def test_over_http_everything_is_as_in_the_folder_and_a_shard_travels_once(
    server: Server, tmp_path: Path
) -> None:
    for url in (server.url, f"{server.url}//"):
        place = open_storage(url, tmp_path)
        assert isinstance(place, RemoteStorage)
        prove(place)
    assert {server.asked[f"/coco/{shard.name}"] for shard in SHARDS} == {1}
    assert str(place) == server.url
    assert str(place.cache) == f"{tmp_path} (100 GB at most)"


@pytest.mark.parametrize(
    "faults", [["503", "503"], ["truncated"], ["reset", "429"], ["flipped", "truncated"]]
)
def test_a_temporary_fault_is_retried(server: Server, tmp_path: Path, faults: list[str]) -> None:
    server.faults = list(faults)
    place = open_storage(server.url, tmp_path)
    assert place.pread(SHARDS[0], 0, SIZE) == CONTENT[0]
    assert server.asked["/coco/train-00000.tar"] == len(faults) + 1
    server.faults = ["503", "reset"]
    assert place.fetch("manifest.json") == b"{}"


@pytest.mark.parametrize(
    ("fault", "asked", "expected"),
    [
        ("flipped", 4, r"200,000 bytes with blake3 \w{12}\.\.\. came, manifest says 200,000 bytes with"),
        ("truncated", 4, r"cannot be read \(Client.*\); expected the file; check the URL and the network"),
        ("500", 4, r"cannot be read \(ClientResponseError: 500"),
        ("403", 1, r"not allowed, or not there \(ClientResponseError: 403.* give credentials"),
        ("401", 1, r"not allowed, or not there \(ClientResponseError: 401"),
        ("404", 1, r"missing, manifest says 200,000 bytes; copy it again"),
    ],
)
def test_a_lasting_fault_is_an_error_and_nothing_is_kept(
    server: Server, tmp_path: Path, fault: str, asked: int, expected: str
) -> None:
    server.faults = [fault] * 9
    place = open_storage(server.url, tmp_path / "cache")
    with pytest.raises(UserError, match=rf"^{server.url}/train-00000.tar: {expected}") as error:
        place.pread(SHARDS[0], 0, 1)
    assert "\n" not in str(error.value)
    assert server.asked["/coco/train-00000.tar"] == asked
    assert cached(tmp_path / "cache") == set()


def test_another_file_under_the_name_of_a_shard_is_not_taken(server: Server, tmp_path: Path) -> None:
    for size, digest, expected in (
        (SIZE - 1, SHARDS[0].blake3, "more than 199,999 bytes came"),
        (SIZE + 1, SHARDS[0].blake3, "200,000 bytes with blake3"),
        (SIZE, "0" * 64, "200,000 bytes with blake3"),
    ):
        with pytest.raises(UserError, match=f"train-00000.tar: {expected}"):
            open_storage(server.url, tmp_path).pread(Shard("train-00000.tar", size, digest, 1), 0, 1)
    assert cached(tmp_path) == set()


def test_a_silent_server_times_out(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_SILENCE_S", 0.5)
    server.faults = ["silent"] * 4
    with pytest.raises(UserError, match=r"manifest.json: cannot be read \(FSTimeoutError\)"):
        open_storage(server.url, tmp_path).fetch("manifest.json")
    server.faults = ["silent"]
    assert open_storage(server.url, tmp_path).pread(SHARDS[0], 0, SIZE) == CONTENT[0]


def test_a_login_of_netrc_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.faults = ["login"]
    assert open_storage(server.url, tmp_path / "cache").fetch("manifest.json") == b"{}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:9/coco", "cannot be read (ClientConnectorError"),
        ("https://no-such-host.invalid/coco", "cannot be read (ClientConnectorDNSError"),
        ("http://[bad/coco", "cannot be read (ValueError"),
        ("http:///coco", "cannot be read (InvalidUrlClientError"),
        ("foo://coco", "cannot be read (ValueError: Protocol not known: foo)"),
        ("a::b://coco", "cannot be read (ValueError: Protocol not known"),
        ("://", "cannot be read ("),
    ],
)
def test_a_url_that_leads_nowhere_is_refused(
    url: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_WAITS_S", ())
    with pytest.raises(UserError) as error:
        open_storage(url, tmp_path).fetch("manifest.json")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_tls_that_cannot_be_trusted_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^https://.*/manifest.json: cannot be read \(Client.*SSL"):
        open_storage(server.url.replace("http://", "https://"), tmp_path).fetch("manifest.json")


def test_a_missing_package_is_reported_on_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UserError, match=r"^gs://bucket/coco: no package that reads gs://.*captionscale\[remote\]"
    ):
        open_storage("gs://bucket/coco", tmp_path)


def test_verify_downloads_a_damaged_shard_again(server: Server, tmp_path: Path) -> None:
    place = open_storage(server.url, tmp_path)
    assert place.pread(SHARDS[0], 5, 1) == CONTENT[0][5:6]
    path = tmp_path / f"{SHARDS[0].blake3}.tar"
    path.write_bytes(bytes(SIZE))
    with place.local_path(SHARDS[0]) as whole:
        assert whole.read_bytes() == CONTENT[0]
    assert place.pread(SHARDS[0], 0, SIZE) == CONTENT[0]


@pytest.mark.usefixtures("started")
def test_neither_the_cache_nor_a_folder_needs_fsspec(folder: Path) -> None:
    script = f"""
import sys
from captionscale.data.storage import open_storage
open_storage({str(folder)!r}).fetch("manifest.json")
assert not {{"fsspec", "aiohttp", "s3fs"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- several processes


def read_elsewhere(server: Server, cache: Path, order: str, max_shards: float = 9) -> subprocess.Popen[bytes]:
    names = [shard.blake3 for shard in SHARDS]
    arguments = [server.url, str(cache), str(max_shards * SIZE / 1e9), order, *names]
    command = [sys.executable, "-c", READ, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def parts(order: str) -> bytes:
    wholes = [CONTENT[int(number)] for number in order.split(",")]
    return b"".join(whole[:10] + whole[150_000:150_010] for whole in wholes)


def test_a_forked_process_can_read(server: Server, tmp_path: Path) -> None:
    place = open_storage(server.url, tmp_path)
    assert place.pread(SHARDS[0], 0, SIZE) == CONTENT[0]
    child = os.fork()
    if child == 0:
        right = all(
            place.pread(shard, 0, SIZE) == data for shard, data in zip(SHARDS[:2], CONTENT, strict=False)
        )
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert place.pread(SHARDS[2], 0, SIZE) == CONTENT[2]
    assert server.asked["/coco/train-00000.tar"] == 1


def test_processes_share_a_cache_that_fits_all_shards(server: Server, tmp_path: Path) -> None:
    orders = ["0,1,2,3", "3,2,1,0", "0,2,1,3"]
    others = [read_elsewhere(server, tmp_path, order) for order in orders]
    for other, order in zip(others, orders, strict=True):
        assert other.communicate()[0] == parts(order)
    assert {server.asked[f"/coco/{shard.name}"] for shard in SHARDS} == {1}
    assert cached(tmp_path) == {f"{shard.blake3}.tar" for shard in SHARDS}


def test_processes_share_a_cache_smaller_than_the_data(server: Server, tmp_path: Path) -> None:
    orders = [",".join(map(str, np.random.default_rng(seed).integers(4, size=60))) for seed in range(3)]
    others = [read_elsewhere(server, tmp_path, order, max_shards=3.2) for order in orders]
    largest = 0
    while any(other.poll() is None for other in others):
        # Nothing comes or goes while we hold this lock; what changes its name meanwhile is counted once.
        with (tmp_path / "room.lock").open("ab") as lock, suppress(FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = [path.stat() for path in tmp_path.glob("*.t*")]
            largest = max(largest, sum({file.st_ino: file.st_size for file in files}.values()))
        time.sleep(0.002)
    for other, order in zip(others, orders, strict=True):
        assert other.communicate()[0] == parts(order)
        assert other.returncode == 0
    assert 0 < largest <= 3.2 * SIZE
    assert sum(server.asked.values()) > 4


def test_a_process_killed_in_a_download_leaves_the_next_one_undisturbed(
    server: Server, tmp_path: Path
) -> None:
    server.faults = ["slow"]
    other = read_elsewhere(server, tmp_path, "0", max_shards=1)
    while not any(path.stat().st_size for path in tmp_path.glob("*.tmp")):
        time.sleep(0.01)
    waiting = read_elsewhere(server, tmp_path, "0,1", max_shards=1)
    time.sleep(0.5)
    other.kill()
    other.communicate()
    assert waiting.communicate()[0] == parts("0,1")
    assert cached(tmp_path) == {f"{SHARDS[1].blake3}.tar"}


def test_ctrl_c_ends_a_download_at_once_without_other_messages(server: Server, tmp_path: Path) -> None:
    server.faults = ["slow"]
    other = read_elsewhere(server, tmp_path, "0")
    while not any(path.stat().st_size for path in tmp_path.glob("*.tmp")):
        time.sleep(0.01)
    other.send_signal(signal.SIGINT)
    lines = other.communicate(timeout=600)[1].decode().splitlines()
    assert cached(tmp_path) == set(), "it went on to its end"
    # The traceback is that of this test's script; asyncio used to add its own after it.
    assert lines[-1] == "KeyboardInterrupt"
    assert cached(tmp_path) == set()


def test_a_full_disk_is_reported_and_nothing_is_left(server: Server, tmp_path: Path) -> None:
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))" + READ
    arguments = [server.url, str(tmp_path), "1", "0", *(shard.blake3 for shard in SHARDS)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    expected = f"UserError: {tmp_path}: File too large; expected a folder that can keep train-00000.tar"
    assert expected in done.stderr.splitlines()[-1]
    assert cached(tmp_path) == set()


# ---- S3


@pytest.fixture(scope="module")
def s3(s3_client: Any) -> None:
    """Shards in a bucket, below a folder."""
    s3_client.put_object(Bucket="bucket", Key="data/coco/manifest.json", Body=b"{}")
    for shard, data in zip(SHARDS, CONTENT, strict=True):
        s3_client.put_object(Bucket="bucket", Key=f"data/coco/{shard.name}", Body=data)


@pytest.mark.usefixtures("s3")
def test_over_s3_everything_is_as_in_the_folder(tmp_path: Path) -> None:
    prove(open_storage("s3://bucket/data/coco/", tmp_path))
    assert cached(tmp_path) == {f"{shard.blake3}.tar" for shard in SHARDS}


@pytest.mark.usefixtures("s3")
def test_a_bucket_or_a_shard_that_is_missing_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_storage("s3://no-such-bucket/coco", tmp_path).fetch("manifest.json")
    shard = Shard("val-00000.tar", SIZE, SHARDS[0].blake3, 1)
    with pytest.raises(UserError, match=r"^s3://bucket/data/coco/val-00000.tar: missing, manifest says"):
        open_storage("s3://bucket/data/coco", tmp_path).pread(shard, 0, 1)
    with pytest.raises(UserError, match=r"^s3://Bad Bucket/coco/manifest.json: cannot be read \(ParamValid"):
        open_storage("s3://Bad Bucket/coco", tmp_path).fetch("manifest.json")


@pytest.mark.usefixtures("s3")
def test_damage_on_s3_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_WAITS_S", (0.01,))
    shard = Shard(SHARDS[1].name, SIZE, SHARDS[0].blake3, 1)
    with pytest.raises(UserError, match="200,000 bytes with blake3"):
        open_storage("s3://bucket/data/coco", tmp_path).pread(shard, 0, 1)


@pytest.mark.usefixtures("s3")
def test_missing_credentials_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = READ.partition("shards =")[0] + "place.fetch('manifest.json')"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    command = [sys.executable, "-c", script, "s3://bucket/data/coco", str(tmp_path), "1", ""]
    done = subprocess.run(command, capture_output=True, text=True)
    expected = "UserError: s3://bucket/data/coco/manifest.json: not allowed, or not there (NoCredentialsError"
    assert expected in done.stderr.splitlines()[-1]
