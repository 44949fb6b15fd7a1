"""Servers that lie, and files of gigabytes by the names of small ones."""

import gzip
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from captionscale import cli
from captionscale.data import download, manifest
from captionscale.data.index import INDEX_DTYPE
from captionscale.data.shards import Split
from captionscale.errors import UserError

MB = 10**6
CAP_BYTES = 60 * MB
"""What an endless answer ends at, so that a client without a bound fails the test and not the machine."""
BUFFERS_BYTES = 16 * MB
"""What the system and the client may hold of an answer that nobody reads any more."""


class LyingServer(ThreadingHTTPServer):
    """Gives the files of a folder over HTTP, one of them as `mode` says."""

    daemon_threads = True
    handle_error = lambda *_: None  # noqa: E731

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.mode = self.file = ""
        self.asked = self.sent = 0
        self.encodings: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}/coco"

    def lie(self, mode: str, file: str) -> None:
        self.mode, self.file, self.asked, self.sent = mode, file, 0, 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LyingServer

    def do_GET(self) -> None:
        path = self.server.folder / self.path.partition("?")[0].rpartition("/")[2]
        if not path.is_file():
            self.send_error(404)
            return
        data, mode = path.read_bytes(), self.server.mode
        self.server.encodings.add(self.headers["Accept-Encoding"])
        if path.name != self.server.file or self.path.startswith("/moved/"):
            self.answer(data)
            return
        self.server.asked += 1
        if mode == "endless":
            self.answer(None, ("Transfer-Encoding", "chunked"))
            self.pour(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        elif mode == "longer":
            self.answer(None, ("Content-Length", str(len(data) + CAP_BYTES)))
            self.wfile.write(data)
            self.pour(bytes(1 << 16))
        elif mode == "other":
            self.answer(bytes(len(data)))
        elif mode == "flipped":
            middle = len(data) // 2
            self.answer(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        elif mode == "broken off":
            self.answer(None, ("Content-Length", str(len(data))))
            self.wfile.write(data[:1000])
            self.close_connection = True
        elif mode == "half":
            self.answer(data[: len(data) // 2])
        elif mode == "bomb":
            self.answer(gzip.compress(bytes(CAP_BYTES)), ("Content-Encoding", "gzip"))
        elif mode == "trickling":
            self.answer(None, ("Content-Length", str(len(data))))
            gone = threading.Event()
            for byte in data[:20_000]:
                self.wfile.write(bytes([byte]))
                gone.wait(0.005)
        elif mode.isdigit():
            self.answer(b"", status=int(mode))
        elif mode == "tagged":
            self.answer(data, ("ETag", '"x"'))
        else:
            self.answer(b"", ("Location", mode.format(path=self.path, name=path.name)), status=302)

    def answer(self, data: bytes | None, *headers: tuple[str, str], status: int = 200) -> None:
        self.send_response(status)
        if data is not None:
            self.send_header("Content-Length", str(len(data)))
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(data or b"")

    def pour(self, piece: bytes) -> None:
        while self.server.sent < CAP_BYTES:
            self.wfile.write(piece)
            self.server.sent += len(piece)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingServer]:
    monkeypatch.setattr(download, "_WAITS_S", (0.0,))
    monkeypatch.setenv("CAPTIONSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with LyingServer(packed) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def left(folder: Path) -> list[str]:
    """Files of a test's folder but the cache's locks."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


TAR, INDEX = "train-00000.tar", "train.index.npy"
INDEX_BYTES = 48 * INDEX_DTYPE.itemsize + 4096


@pytest.mark.parametrize(
    ("mode", "file", "tries", "expected"),
    [
        ("endless", "manifest.json", 1, "manifest.json: more than 16,000,000 bytes came, expected at most"),
        ("bomb", "manifest.json", 1, "manifest.json: more than 16,000,000 bytes came, expected at most"),
        ("endless", INDEX, 1, f"{INDEX}: more than {INDEX_BYTES:,} bytes came, expected at most"),
        ("bomb", INDEX, 1, f"{INDEX}: more than {INDEX_BYTES:,} bytes came, expected at most"),
        ("endless", TAR, 1, f"{TAR}: more than {{size:,}} bytes came, expected at most"),
        ("longer", TAR, 1, f"{TAR}: more than {{size:,}} bytes came, expected at most"),
        ("bomb", TAR, 1, f"{TAR}: more than {{size:,}} bytes came, expected at most"),
        ("other", TAR, 2, f"{TAR}: {{size:,}} bytes with blake3"),
        ("flipped", TAR, 2, f"{TAR}: {{size:,}} bytes with blake3"),
        ("half", TAR, 2, f"{TAR}: {{half:,}} bytes with blake3"),
        ("broken off", TAR, 2, f"{TAR}: cannot be read (ClientPayloadError"),
        ("trickling", TAR, 2, "bytes came in 0 s, expected at least 100,000; check the network"),
        ("500", TAR, 2, f"{TAR}: cannot be read (ClientResponseError: 500"),
        ("404", TAR, 1, f"{TAR}: missing, manifest says {{size:,}} bytes"),
        ("{path}", TAR, 10, f"{TAR}: cannot be read (TooManyRedirects"),
        ("file:///etc/passwd", TAR, 1, f"{TAR}: cannot be read (NonHttpUrlRedirectClientError"),
    ],
)
def test_a_lie_is_an_error_of_bounded_size_and_the_next_attempt_works(
    server: LyingServer,
    packed: Path,
    tmp_path: Path,
    mode: str,
    file: str,
    tries: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if mode == "trickling":
        monkeypatch.setattr(download, "_SLOW_S", 0.1)
    split = Split(packed, "train")
    command = ["show", server.url, str(split.index["image_id"][0])]
    server.lie(mode, file)
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 1
    size = split.info.shards[0].size_bytes
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"captionscale: {server.url}/")
    assert expected.format(size=size, half=size // 2) in said
    assert server.asked == tries
    assert server.sent <= 16 * MB + BUFFERS_BYTES
    assert left(tmp_path) == []
    server.lie("", "")
    cli.main(command)
    assert "pixels" in capsys.readouterr().out
    assert server.encodings == {"identity"}


@pytest.mark.parametrize("mode", ["/moved/{name}", "tagged"])
def test_what_is_unusual_but_honest_works(server: LyingServer, packed: Path, mode: str) -> None:
    server.lie(mode, TAR)
    cli.main(["show", server.url, str(Split(packed, "train").index["image_id"][0])])
    assert server.asked == 1


def test_a_redirect_from_https_to_http_is_refused(server: LyingServer, tmp_path: Path) -> None:
    x509 = pytest.importorskip("cryptography.x509")
    key, certificate = make_certificate(x509, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.lie("http://127.0.0.1:9/{name}?token=hidden-one", "manifest.json")
    url = server.url.replace("http://127.0.0.1", "https://localhost")
    done = subprocess.run(
        [sys.executable, "-m", "captionscale", "stats", url],
        env={**os.environ, "SSL_CERT_FILE": str(certificate)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    expected = f"{url}/manifest.json: redirects to 'http://127.0.0.1:9/manifest.json', expected https://"
    assert expected in done.stderr.splitlines()[-1]
    assert "hidden-one" not in done.stderr


def make_certificate(x509: object, folder: Path) -> tuple[Path, Path]:
    from datetime import datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now().astimezone()
    builder = x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate = builder.sign(private, hashes.SHA256())
    key_path, path = folder / "key.pem", folder / "certificate.pem"
    pem = serialization.Encoding.PEM
    key_path.write_bytes(
        private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    path.write_bytes(certificate.public_bytes(pem))
    return key_path, path


def test_a_slow_link_is_no_stalled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(download.time, "monotonic", lambda: now[0])
    arrived = download._Progress("https://host/file", 10**9)
    for _ in range(906):  # 28 kbit/s
        now[0] += 1.0
        arrived.count(3500)

    def trickle() -> None:
        for _ in range(1000):
            now[0] += 5.0
            arrived.count(1)

    with pytest.raises(
        UserError, match=r"^https://host/file: [\d,]+ bytes came in 30\d s, expected at least"
    ):
        trickle()


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
@pytest.mark.parametrize("file", ["manifest.json", INDEX])
@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_a_folder_is_read_no_further_than_a_server(
    packed: Path,
    tmp_path: Path,
    kind: str,
    file: str,
    scheme: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAPTIONSCALE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in packed.iterdir():
        if path.is_file() and path.name != file:
            (folder / path.name).hardlink_to(path)
    bad = folder / file
    if kind == "fifo":
        os.mkfifo(bad)
    elif kind == "device":
        bad.symlink_to("/dev/zero")
    elif kind == "folder":
        bad.mkdir()
    else:
        with bad.open("wb") as sparse:
            sparse.truncate(1 << 40)
    with pytest.raises(SystemExit) as ended:
        cli.main(["stats", f"{scheme}{folder}"])
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"captionscale: {'local://' if scheme == 'local://' else ''}{folder}")


def test_an_s3_object_that_is_larger_than_expected_is_not_downloaded(
    s3_client, packed: Path, tmp_path: Path
) -> None:
    from captionscale.data.storage import open_storage

    s3_client.put_object(
        Bucket="bucket", Key="large/manifest.json", Body=bytes(manifest.MAX_MANIFEST_BYTES + 1)
    )
    place = open_storage("s3://bucket/large", tmp_path)
    with pytest.raises(UserError, match=r"^s3://bucket/large/manifest.json: more than 16,000,000 bytes came"):
        place.fetch("manifest.json")
    shard = Split(packed, "train").info.shards[0]
    s3_client.put_object(Bucket="bucket", Key=f"large/{shard.name}", Body=bytes(shard.size_bytes + 1))
    with pytest.raises(UserError, match=rf"{shard.name}: more than {shard.size_bytes:,} bytes came"):
        place.pread(shard, 0, 1)
    assert left(tmp_path) == []
