"""The demo's bounds hold while requests are received, and it stops whatever is in progress."""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from demo_server import serve_app
from experiment import peaked_run
from fastapi import FastAPI
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import captionscale
from captionscale.data import decode
from captionscale.errors import UserError
from captionscale.tools.demo.connections import ConnectionLimits
from captionscale.tools.demo.endpoint import create_api
from captionscale.tools.demo.request_body import MemoryBudget, MinRate, RequestError, chunks
from captionscale.tools.demo.service import Limits, Service

JPEG = {"Content-Type": "image/jpeg"}
RATE = MinRate(grace_s=0.3, bytes_per_s=1e6)


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaked_run(tmp_path_factory.mktemp("bounds"), packed)


@pytest.fixture(scope="module")
def service(run: Path) -> Iterator[Service]:
    limits = Limits(min_rate=RATE, max_pixels=1_000_000, large_image_pixels=10_000)
    service = Service(captionscale.load(run), limits)
    yield service
    service.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with serve_app(create_api(service, "tiny")) as url:
        yield url


@pytest.fixture
def photo(synthetic_coco: Path) -> bytes:
    return next((synthetic_coco / "test2017").iterdir()).read_bytes()


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "192.0.2.7:80"}, 200),
        ({"Host": "proxy.example"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "evil.example#127.0.0.1"}, 421),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 403),
    ],
)
def test_other_hosts_and_origins_are_refused(
    url: str, photo: bytes, headers: dict[str, str], status: int
) -> None:
    answer = httpx.post(f"{url}/caption", content=photo, headers=JPEG | headers, timeout=600, verify=False)
    assert answer.status_code == status
    linked = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    if "Host" not in headers and "Origin" not in headers:
        assert httpx.get(f"{url}/docs", headers=headers | linked, verify=False).status_code == 200


def test_no_decoded_image_leaves_the_decoding_threads(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most, real = set[int](), 0, decode.decode_image

    def pixels(data: bytes, place: str) -> np.ndarray:
        nonlocal most
        found = real(data, place)
        alive.add(id(found))
        weakref.finalize(found, alive.discard, id(found))
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(decode, "decode_image", pixels)
    small, large = png(90, 90), png(900, 900)
    futures = [service.decode(data, "x", service.pipeline.center_crop) for data in [small, large] * 15]
    views = [future.result(600) for future in futures]
    assert {view.shape for view in views} == {(64, 64, 3)}
    assert len(alive) < most <= service.limits.decode_threads + 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
def test_only_the_threads_for_it_decode_a_large_png(
    service: Service, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow decodes a whole PNG to learn its orientation.
    loads, real = list[str](), PngImageFile.load

    def load(image: PngImageFile) -> object:
        loads.append(threading.current_thread().name)
        return real(image)

    monkeypatch.setattr(PngImageFile, "load", load)
    out = io.BytesIO()
    Image.new(mode, (900, 900)).save(out, "PNG")
    service.decode(out.getvalue(), "x", service.pipeline.center_crop).result(600)
    assert loads
    assert all(name.startswith("decode-large") for name in loads)
    loads.clear()
    out = io.BytesIO()
    Image.new(mode, (2000, 900)).save(out, "PNG")
    with pytest.raises(UserError, match="1,800,000 pixels"):
        service.decode(out.getvalue(), "x", service.pipeline.center_crop).result(600)
    assert loads == []


def test_a_large_image_does_not_delay_small_ones(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    release, real = threading.Event(), decode.decode_image

    def pixels(data: bytes, place: str) -> np.ndarray:
        if place == "large":
            release.wait(60)
        return real(data, place)

    monkeypatch.setattr(decode, "decode_image", pixels)
    large = [service.decode(png(900, 900), "large", service.pipeline.center_crop) for _ in range(5)]
    small = [service.decode(png(90, 90), "small", service.pipeline.center_crop) for _ in range(5)]
    for future in small:
        future.result(600)
    assert not any(future.done() for future in large)
    release.set()
    for future in large:
        future.result(600)


def test_the_slowest_body_is_dropped_when_the_memory_for_bodies_is_full() -> None:
    memory = MemoryBudget(100)
    with memory.body() as slow, memory.body() as done:
        slow.add(bytes(40))
        done.add(bytes(50))
        assert done.complete() == bytes(50)
        with memory.body() as late:
            late.add(bytes(45))
            with pytest.raises(RequestError, match="try again later"):
                slow.add(b"x")
            # What is complete stays.
            with memory.body() as last, pytest.raises(RequestError):
                last.add(bytes(51))
            assert late.dropped
    with memory.body() as body:
        body.add(bytes(100))


def test_a_body_that_is_too_slow_is_refused() -> None:
    async def drip() -> dict[str, object]:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def read() -> None:
        async for _ in chunks(drip, RATE):
            pass

    with pytest.raises(RequestError, match="expected at least 1,000,000 bytes per second"):
        asyncio.run(read())


def test_slow_senders_and_half_headers_lock_nobody_out(service: Service, photo: bytes) -> None:
    head = b"POST /caption HTTP/1.1\r\nHost: localhost\r\n"
    body = b"Content-Type: image/jpeg\r\nContent-Length: 1000000\r\n\r\n123"
    with serve_app(
        create_api(service, "tiny"), ConnectionLimits(connections=20, headers_timeout_s=1.0)
    ) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        evil = [socket.create_connection(address) for _ in range(40)]
        for number, each in enumerate(evil):
            each.sendall(head if number % 4 else head + body)
        answer = httpx.post(f"{url}/caption", content=photo, headers=JPEG, timeout=600, verify=False)
        assert answer.status_code == 200
        for each in evil:
            each.settimeout(60)
            try:
                while each.recv(1000):
                    pass
            except ConnectionResetError:
                pass
            each.close()


def test_a_connection_that_does_not_read_its_answer_is_closed() -> None:
    app = FastAPI()
    app.get("/")(lambda: {"much": "x" * 50_000_000})
    limits = ConnectionLimits(write_timeout_s=0.5)
    with serve_app(app, limits) as url, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        lazy.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert lazy.recv(1)
        assert limits.addresses
        until = time.monotonic() + 600
        while limits.addresses:
            assert time.monotonic() < until
            threading.Event().wait(0.01)


def test_an_image_whose_client_has_left_is_not_decoded(
    service: Service, url: str, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release, decoded = threading.Event(), threading.Event(), []
    real = decode.decode_image

    def pixels(data: bytes, place: str) -> np.ndarray:
        decoded.append(place)
        begun.set()
        release.wait(60)
        return real(data, place)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode_image", pixels)
        busy = [
            service.decode(photo, "busy", service.pipeline.center_crop)
            for _ in range(service.limits.decode_threads)
        ]
        assert begun.wait(600)
        for _ in range(5):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/caption", content=photo, headers=JPEG, timeout=0.3, verify=False)
        until = time.monotonic() + 600
        while service._slots._value < service.limits.max_requests:
            assert time.monotonic() < until
            threading.Event().wait(0.01)
        release.set()
        for future in busy:
            future.result(600)
        assert service.decode(photo, "last", service.pipeline.center_crop).result(600).shape == (64, 64, 3)
    assert decoded.count("the image") == 0


STUCK = """
import sys, threading
from captionscale.data import decode
from captionscale.errors import UserError
from captionscale.cli import main
real = decode.decode_image
def pixels(data, place):
    if place == "the image":
        print("stuck", flush=True)
        threading.Event().wait()
    return real(data, place)
decode.decode_image = pixels
main(sys.argv[1:])
"""


def test_a_signal_stops_the_server_whatever_is_in_progress(run: Path, photo: bytes, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, "demo", str(run), "--port", "0"],
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        while "Ctrl-C" not in process.stdout.readline():
            pass
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photo)}\r\n\r\n"
            client.sendall(head.encode() + photo)
            assert process.stdout.readline() == "stuck\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(600) == 0
    assert [path for path in tmp_path.iterdir() if path.name.startswith("captionscale")] == []
