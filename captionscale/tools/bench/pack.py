"""`captionscale bench pack`: from image files to shards, beside the ways that people have today."""

import io
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from captionscale import subprocesses
from captionscale.data import decode, packing, resize, synthetic
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.files import cpu_count
from captionscale.progress import say
from captionscale.tools.bench.race import Heat, Way, race

_SIDE, _QUALITY = 256, 95
_CAPTIONS = ("A man on a bicycle rides down a busy street.",) * 5


def bench(pictures: Path | None, folder: Path | None, *, count: int, rounds: int) -> list[Heat]:
    """Measure packing.

    Args:
        pictures: JPEGs, anywhere below this folder; None: drawn ones.
        folder: Where to write; None: the system's temporary folder. Its disk is part of what is measured.
        count: Images in a run; the pictures are repeated until there are so many.
        rounds: Of each table.

    Raises:
        UserError: No pictures, or a package of the extra `bench` is missing.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="captionscale-bench-") as name:
        records = _copies(pictures, Path(name), count)
        return [
            _originals(records, Path(name), rounds),
            _shrinking(records[: max(1, count // 4)], rounds),
            *_scaling(records, Path(name), rounds),
        ]


def _copies(pictures: Path | None, folder: Path, count: int) -> list[Record]:
    """Lay files out as GNU tar would take them, a .json beside each, and return them as records."""
    if pictures is None:
        say("note: drawn pictures, which are simpler than photographs; give --images for yours")
        pictures = folder / "drawn"
        synthetic.write_coco(pictures, counts={"train": 100}, size=560)
    files = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{pictures}: no .jpg files; wanted a folder of photographs, such as COCO's val2017")
    source = folder / "source"
    source.mkdir()
    records = []
    for image_id in range(count):
        record = Record(image_id, "train", _CAPTIONS, str(source), f"{image_id:012d}.jpg")
        file = files[image_id % len(files)]
        decode.image_info(file.read_bytes(), str(file), full_decode=True)
        shutil.copyfile(file, source / record.name)
        (source / record.name).with_suffix(".json").write_text(json.dumps(_facts(record)))
        records.append(record)
    return records


def _facts(record: Record) -> dict[str, Any]:
    return {"image_id": record.image_id, "file": record.name, "captions": record.captions}


def _originals(records: list[Record], folder: Path, rounds: int) -> Heat:
    """Original bytes into tars by one process; each way ends when its tars are on the disk."""

    def shard_writer() -> None:
        with (
            _fresh(folder) as out,
            webdataset.ShardWriter(f"{out}/%05d.tar", maxcount=1000, verbose=0) as sink,
        ):
            for record in records:
                key, file = f"{record.image_id:012d}", Path(record.source) / record.name
                sink.write({"__key__": key, "jpg": file.read_bytes(), "json": _facts(record)})

    def gnu_tar() -> None:
        with _fresh(folder) as out:
            subprocesses.run(["tar", "-cf", out / "all.tar", "-C", records[0].source, "."]).check_returncode()

    def copy() -> None:
        with _fresh(folder) as out, (out / "all").open("wb") as file:
            for record in records:
                file.write(record.read())

    headers, whole = packing.PackOptions(full_decode=False), packing.PackOptions()
    ways = [
        Way("captionscale pack --no-decode", lambda: _pack(records, folder, headers), len(records)),
        Way("captionscale pack", lambda: _pack(records, folder, whole), len(records)),
        Way("webdataset.ShardWriter", shard_writer, len(records)),
        *([Way("GNU tar", gnu_tar, len(records))] if shutil.which("tar") else []),
        Way("the limit: read and write, nothing else", copy, len(records), guarded=False),
    ]
    heat = race("Original bytes, one process", "images", ways, rounds)
    heat.notes += [
        "Ours hashes tars (BLAKE3) and samples, writes index and manifest; without --no-decode it decodes.",
        "All ways end when their bytes are on the disk (fsync).",
    ]
    return heat


def _shrinking(records: list[Record], rounds: int) -> Heat:
    """Decode, resize, encode, on one core."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "bench pack: no OpenCV, wanted it for the comparison; pip install 'captionscale[bench]'"
        ) from None
    cv2.setNumThreads(0)
    data = [record.read() for record in records]

    def ours() -> None:
        for bits in data:
            resize.resize_to_jpeg(bits, "", side=_SIDE, quality=_QUALITY)

    def opencv() -> None:
        for bits in data:
            picture = cv2.imdecode(np.frombuffer(bits, np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None
            height, width = resize.resized_shape(picture.shape[0], picture.shape[1], _SIDE)
            small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
            cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])

    def pillow() -> None:
        for bits in data:
            picture = Image.open(io.BytesIO(bits)).convert("RGB")
            height, width = resize.resized_shape(picture.height, picture.width, _SIDE)
            small = picture.resize((width, height), Image.Resampling.BICUBIC)
            small.save(io.BytesIO(), "JPEG", quality=_QUALITY)

    ways = [
        Way("captionscale pack --resize (antialiased bicubic)", ours, len(data)),
        Way("img2dataset's core: OpenCV, INTER_AREA", opencv, len(data)),
        Way("Pillow, bicubic", pillow, len(data)),
    ]
    heat = race(f"Shorter side {_SIDE}, quality {_QUALITY}, one core", "images", ways, rounds, by_cpu=True)
    closeness = [_closeness_db(bits) for bits in data[:50]]
    heat.notes.append(
        f"Before encoding, ours is {min(closeness):.1f} dB or more from Pillow's bicubic (PSNR,"
        f" {len(closeness)} images)."
    )
    return heat


def _closeness_db(data: bytes) -> float:
    picture = decode.decode_image(data, "")
    height, width = resize.resized_shape(picture.shape[0], picture.shape[1], _SIDE)
    theirs = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), float)
    squares = (resize.resize_image(picture, height, width) - theirs) ** 2
    return float(10 * np.log10(255**2 / max(squares.mean(), 1e-12)))


def _scaling(records: list[Record], folder: Path, rounds: int) -> list[Heat]:
    """A worker process on each core beside one core alone, in the three ways to pack."""
    heats = []
    # Resizing first: the server of the workers then has torch, and no later one waits for its import.
    # The faster a way, the more images, so that the start of the workers counts little.
    for name, times, options in (
        (f"--resize {_SIDE}", 1, packing.PackOptions(100, short_side=_SIDE, quality=_QUALITY)),
        ("", 2, packing.PackOptions(100)),
        ("--no-decode", 16, packing.PackOptions(500, full_decode=False)),
    ):
        memory: list[int] = []
        many = [replace(record, image_id=number) for number, record in enumerate(records * times)]

        def all_cores(many: list[Record] = many, options: Any = options, memory: list[int] = memory) -> None:
            def watch(_: int) -> None:
                memory.extend(_megabytes(child.pid) for child in multiprocessing.active_children())

            _pack(many, folder, replace(options, workers=cpu_count()), watch)

        def one_core(many: list[Record] = many, options: Any = options) -> None:
            own = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(own)})
            _pack(many, folder, options)
            os.sched_setaffinity(0, own)

        ways = [
            Way(f"{cpu_count()} cores", all_cores, len(many)),
            Way("1 core", one_core, len(many), guarded=False),
        ]
        heat = race(f"captionscale pack {name}".strip() + ", all cores", "images", ways, rounds)
        heat.notes.append(f"A worker has {max(memory):,} MB at most (its share of what is shared included).")
        heats.append(heat)
    return heats


def _megabytes(process: int | None) -> int:
    """Return a process's proportional set size: its own memory, and its share of what it shares."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) // 1000
    return 0


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
    """Give an empty folder; what comes into it goes to the disk, and then away."""
    out = folder / "out"
    out.mkdir()
    yield out
    for path in out.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(out)
