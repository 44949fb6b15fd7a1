"""Packing image files into shards: captionscale, webdataset, GNU tar, img2dataset's core.

Measured gains (docs/performance.md): `pack --no-decode` 2.3 times as fast as webdataset's ShardWriter,
`pack --resize` 1.3 times as fast as img2dataset's core (OpenCV), 1.86 times as fast with two worker
processes as with one.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import webdataset
from comparison import Candidate, Table, compare, run
from images import add_arguments, copy_images
from PIL import Image

from captionscale import subprocesses
from captionscale.data import decode, packing, resize
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.machine import cpu_count

_SIDE, _QUALITY = 256, 95


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Run the benchmark; return its tables."""
    parser = argparse.ArgumentParser("pack.py", description="Packing image files into shards.")
    add_arguments(parser)
    return run(
        _measure,
        parser,
        arguments,
        full={"count": 1000, "rounds": 5},
        quick={"count": 100, "rounds": 2},
        tiny={"count": 4, "rounds": 1},
    )


def _measure(options: argparse.Namespace) -> Iterator[Table]:
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="captionscale-bench-") as name:
        records = copy_images(options.images, Path(name), options.count)
        for record in records:
            path = Path(record.source) / record.name
            path.with_suffix(".json").write_text(json.dumps(_metadata(record)))
        yield _original_bytes(records, Path(name), options.rounds)
        yield _resizing(records[: max(1, options.count // 4)], options.rounds)
        yield from _scaling(records, Path(name), options.rounds)


def _metadata(record: Record) -> dict[str, Any]:
    return {"image_id": record.image_id, "file": record.name, "captions": record.captions}


def _original_bytes(records: list[Record], folder: Path, rounds: int) -> Table:
    def shard_writer() -> None:
        with (
            _fresh(folder) as out,
            webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=1000, verbose=0) as sink,
        ):
            for record in records:
                key, file = f"{record.image_id:012d}", Path(record.source) / record.name
                sink.write({"__key__": key, "jpg": file.read_bytes(), "json": _metadata(record)})

    def gnu_tar() -> None:
        with _fresh(folder) as out:
            subprocesses.run(["tar", "-cf", out / "all.tar", "-C", records[0].source, "."]).check_returncode()

    def copy() -> None:
        with _fresh(folder) as out, (out / "all").open("wb") as file:
            for record in records:
                file.write(record.read())

    headers, whole = packing.PackOptions(full_decode=False), packing.PackOptions()
    candidates = [
        Candidate("captionscale pack --no-decode", lambda: _pack(records, folder, headers), len(records)),
        Candidate("captionscale pack", lambda: _pack(records, folder, whole), len(records)),
        Candidate("webdataset.ShardWriter", shard_writer, len(records)),
        *([Candidate("GNU tar", gnu_tar, len(records))] if shutil.which("tar") else []),
        Candidate("lower bound: read and write only", copy, len(records)),
    ]
    table = compare("Original bytes, one process", "images", candidates, rounds)
    table.notes += [
        "Ours hashes tars (BLAKE3) and samples, writes index and manifest; without --no-decode it decodes.",
        "All end when their bytes are on disk (fsync).",
    ]
    return table


def _resizing(records: list[Record], rounds: int) -> Table:
    """Decode, resize and encode with one thread."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "no OpenCV, expected it for the comparison; pip install 'captionscale[bench]'"
        ) from None
    cv2.setNumThreads(0)
    files = [record.read() for record in records]

    def ours() -> None:
        for data in files:
            resize.resize_to_jpeg(data, "", side=_SIDE, quality=_QUALITY)

    def opencv() -> None:
        for data in files:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            assert image is not None
            height, width = resize.resized_shape(image.shape[0], image.shape[1], _SIDE)
            small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])

    def pillow() -> None:
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            height, width = resize.resized_shape(image.height, image.width, _SIDE)
            small = image.resize((width, height), Image.Resampling.BICUBIC)
            small.save(io.BytesIO(), "JPEG", quality=_QUALITY)

    candidates = [
        Candidate("captionscale pack --resize (antialiased bicubic)", ours, len(files)),
        Candidate("img2dataset's core: OpenCV, INTER_AREA", opencv, len(files)),
        Candidate("Pillow, bicubic", pillow, len(files)),
    ]
    title = f"Shorter side {_SIDE}, quality {_QUALITY}, one thread"
    table = compare(title, "images", candidates, rounds, by_cpu=True)
    psnr = [_psnr_db(data) for data in files[:50]]
    table.notes.append(
        f"Before encoding, ours differs from Pillow's bicubic by {min(psnr):.1f} dB PSNR or more"
        f" ({len(psnr)} images)."
    )
    return table


def _psnr_db(data: bytes) -> float:
    image = decode.decode_image(data, "")
    height, width = resize.resized_shape(image.shape[0], image.shape[1], _SIDE)
    theirs = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), float)
    squares = (resize.resize_image(image, height, width) - theirs) ** 2
    return float(10 * np.log10(255**2 / max(squares.mean(), 1e-12)))


def _scaling(records: list[Record], folder: Path, rounds: int) -> Iterator[Table]:
    """Compare a worker process on each core with one core."""
    # Resizing first: the forkserver then has imported torch. Faster modes pack more images, so that the
    # workers' start counts little.
    for name, times, options in (
        (f"--resize {_SIDE}", 1, packing.PackOptions(100, short_side=_SIDE, quality=_QUALITY)),
        ("", 2, packing.PackOptions(100)),
        ("--no-decode", 16, packing.PackOptions(500, full_decode=False)),
    ):
        memory: list[float] = []
        many = [replace(record, image_id=number) for number, record in enumerate(records * times)]

        def all_cores(
            many: list[Record] = many, options: Any = options, memory: list[float] = memory
        ) -> None:
            def watch(_: int) -> None:
                memory.extend(_pss_mb(child.pid) for child in multiprocessing.active_children())

            _pack(many, folder, replace(options, workers=cpu_count()), watch)

        def one_core(many: list[Record] = many, options: Any = options) -> None:
            own = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(own)})
            _pack(many, folder, options)
            os.sched_setaffinity(0, own)

        candidates = [
            Candidate(f"{cpu_count()} cores", all_cores, len(many)),
            Candidate("1 core", one_core, len(many)),
        ]
        title = f"captionscale pack {name}".strip() + ", all cores"
        table = compare(title, "images", candidates, rounds)
        table.notes.append(
            f"A worker takes {max(memory, default=0):,.0f} MB at most (proportional set size)."
        )
        yield table


def _pss_mb(process: int | None) -> float:
    with suppress(psutil.Error):
        return float(psutil.Process(process).memory_full_info().pss / 1e6)
    return 0.0


def _pack(
    records: list[Record],
    folder: Path,
    options: packing.PackOptions,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    with _fresh(folder) as out:
        packing.pack(records, out, sources=[], options=options, progress=progress)


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; flush its files to disk, then delete it."""
    out = folder / "out"
    out.mkdir()
    yield out
    for path in out.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
