"""A minute of mixed clients with image bombs among them, against a demo of your own. Run it by hand.

    python tests/hostile/load.py URL PID FOLDER [--seconds 60] [--clients 100]

URL is the demo's address, PID its process on this machine, FOLDER one of ordinary images. It prints how many
requests of each kind got each status, honest clients' latency and the process's memory.
"""

import argparse
import asyncio
import collections
import os
import random
import statistics
import struct
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil

EXPECTED = {
    "honest": {200, 503},
    "garbage": {422, 503},
    "bad option": {422},
    "type": {415},
    "too large": {413},
    "too many pixels": {422, 503},
    "bomb": {200, 503},
    "slow": {200, 408, 503},
    "forged event": {400},
    "upload": {200},
    "foreign": {403},
}


def bomb(side: int, colour: int, channels: int) -> bytes:
    """Return a small PNG of many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0)
    row = bytes(1 + channels * side)
    data = zlib.compress(row * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Trial:
    """Clients and what they were answered."""

    def __init__(self, url: str, images: list[bytes], seconds: float):
        self.url, self.images = url, images
        self.until = time.monotonic() + seconds
        self.bombs = [bomb(7000, 6, 4), bomb(7000, 2, 3), bomb(3500, 6, 4)]
        self.huge = bomb(9000, 2, 3)
        self.answers: collections.Counter[tuple[str, int | str]] = collections.Counter()
        self.latency: list[float] = []

    async def client(self, number: int, http: httpx.AsyncClient) -> None:
        """Send requests of random kinds until the time is over."""
        choose = random.Random(number)
        kinds = ["honest"] * 65 + ["bomb"] * 4 + ["slow"] * 5
        kinds += ["garbage"] * 8 + [kind for kind in EXPECTED if kind not in kinds] * 3
        while time.monotonic() < self.until:
            kind, begun = choose.choice(kinds), time.monotonic()
            try:
                status: int | str = (await self.ask(kind, choose, http)).status_code
            except httpx.HTTPError as error:
                status = type(error).__name__
            if kind == "honest" and status == 200:
                self.latency.append(time.monotonic() - begun)
            self.answers[kind, status] += 1
            await asyncio.sleep(choose.random() * 0.05)

    async def ask(self, kind: str, choose: random.Random, http: httpx.AsyncClient) -> httpx.Response:
        """Send one request."""
        image = choose.choice(self.images)

        async def slowly() -> AsyncIterator[bytes]:
            for first in range(0, len(image), 800):
                yield image[first : first + 800]
                await asyncio.sleep(0.5)

        if kind == "forged event":
            data = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]
            event = {"data": data, "fn_index": 0, "session_hash": "load"}
            return await http.post(f"{self.url}/gradio_api/queue/join", json=event)
        if kind == "upload":
            files = [("files", (f"{number}.jpg", image)) for number in range(3)]
            return await http.post(f"{self.url}/gradio_api/upload", files=files)
        bodies = {
            "garbage": os.urandom(3000),
            "too large": bytes(21_000_000),
            "too many pixels": self.huge,
            "bomb": choose.choice(self.bombs),
            "slow": slowly(),
        }
        headers = {"Content-Type": "text/html" if kind == "type" else "image/jpeg"}
        if kind == "foreign":
            headers["Origin"] = "http://elsewhere.example"
        query = "?beam=99" if kind == "bad option" else "?beam=2"
        return await http.post(f"{self.url}/caption{query}", content=bodies.get(kind, image), headers=headers)


async def run(trial: Trial, clients: int, process: psutil.Process) -> list[float]:
    """Run all clients; return the process's memory in MB, each half second."""
    memory: list[float] = []
    limits = httpx.Limits(max_connections=2 * clients, max_keepalive_connections=2 * clients)

    async def watch() -> None:
        while time.monotonic() < trial.until:
            memory.append(process.memory_info().rss / 1e6)
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        await asyncio.gather(watch(), *(trial.client(number, http) for number in range(clients)))
    return memory


def main() -> None:
    """Run the trial and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("pid", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=100)
    options = parser.parse_args()
    process = psutil.Process(options.pid)
    images = [file.read_bytes() for file in sorted(options.folder.iterdir())[:40]]
    before = process.memory_info().rss / 1e6
    trial = Trial(options.url, images, options.seconds)
    memory = asyncio.run(run(trial, options.clients, process))
    for (kind, status), count in sorted(trial.answers.items(), key=str):
        print(f"{kind:16} {status!s:20} {count:6} {'' if status in EXPECTED[kind] else '  UNEXPECTED'}")
    twentieths = statistics.quantiles(trial.latency, n=20)
    print(f"honest: {len(trial.latency)} captions, median {twentieths[9]:.2f} s, p95 {twentieths[18]:.2f} s")
    third = len(memory) // 3
    print(
        f"memory: {before:.0f} MB before, at most {max(memory):.0f}; in thirds at most"
        f" {max(memory[:third]):.0f}, {max(memory[third : 2 * third]):.0f}, {max(memory[2 * third :]):.0f}"
    )


if __name__ == "__main__":
    main()
