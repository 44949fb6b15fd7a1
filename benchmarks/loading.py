"""Loading training batches from shards: captionscale, webdataset, and image files with torchvision.

Measured gains (docs/performance.md): with one thread 2.15 times as fast as webdataset at 256 pixels and 2.2
times at native size; two threads 2.65 and 1.7 times as fast as webdataset with two worker processes.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from comparison import Candidate, Table, compare, one_thread, run
from images import add_arguments, copy_images
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from captionscale import vocab
from captionscale.config import Data
from captionscale.data import packing
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.data.sources.record import Record
from captionscale.errors import UserError

_SIZE, _CROP = 224, (0.5, 1.0)
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_KINDS = (
    ("shorter side 256", packing.PackOptions(short_side=256, quality=95)),
    ("native size", packing.PackOptions()),
)
# Difference of two correct resizers, in steps of 256.
_MAX_STEPS, _MEAN_STEPS = 3, 0.5


@dataclass(frozen=True)
class _Stored:
    """Images as shards, and the same bytes as files."""

    split: Split
    tars: list[str]
    files: list[Path]
    batch: int


class _Files(Dataset[tuple[Tensor, int]]):
    """Image files, read as torchvision's ImageFolder does."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        with self.files[number].open("rb") as file:
            return _augmentation()(Image.open(file).convert("RGB")), number


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Run the benchmark; return its tables."""
    parser = argparse.ArgumentParser("loading.py", description="Loading training batches from shards.")
    add_arguments(parser)
    return run(
        _measure,
        parser,
        arguments,
        full={"count": 1000, "rounds": 5, "batch": 32},
        quick={"count": 200, "rounds": 2, "batch": 32},
        tiny={"count": 8, "rounds": 1, "batch": 4},
    )


def _measure(options: argparse.Namespace) -> Iterator[Table]:
    # With more, each candidate's arithmetic would use all cores.
    with one_thread(), tempfile.TemporaryDirectory(dir=options.folder, prefix="captionscale-bench-") as name:
        records = copy_images(options.images, Path(name), options.count)
        for number, (kind, packed) in enumerate(_KINDS):
            some = records if packed.short_side else records[: max(options.batch, options.count // 3)]
            stored = _store(some, Path(name) / str(number), packed, options.batch)
            note = _check_equal(stored)
            table = _single_threaded(kind, stored, options.rounds)
            table.notes.append(note)
            yield table
            yield _two_cores(kind, stored, options.rounds)


def _store(records: list[Record], folder: Path, options: packing.PackOptions, batch: int) -> _Stored:
    """Pack images into four shards, and write their stored bytes to files."""
    four = packing.PackOptions(-(-len(records) // 4), short_side=options.short_side, quality=options.quality)
    packing.pack(records, folder / "shards", sources=[], options=four)
    split = Split(folder / "shards", "train")
    files = []
    for item in range(len(split)):
        files.append(folder / f"{item:06d}.jpg")
        files[-1].write_bytes(split.image(item))
    tars = [str(folder / "shards" / shard.name) for shard in split.info.shards]
    return _Stored(split, tars, files, batch)


def _single_threaded(kind: str, stored: _Stored, rounds: int) -> Table:
    images = [stored.split.image(item) for item in range(len(stored.split))]

    def decode_only() -> None:
        for data in images:
            simplejpeg.decode_jpeg(data)

    count, loader = len(images), _loader(stored, workers=1)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (_MEAN, _STD))
    scale, shift = 1 / (255 * std), -mean / std

    def normalized() -> None:
        # As the encoder does it.
        for batch in _ours(loader, stored):
            torch.addcmul(shift, batch.float(), scale)

    candidates = [
        Candidate(
            "captionscale: uint8 batches, normalized by the model",
            _exhaust(lambda: _ours(loader, stored)),
            count,
        ),
        Candidate("captionscale, normalized by the loader's core", normalized, count),
        Candidate("webdataset, Pillow, torchvision", _exhaust(lambda: _webdataset(stored, 0)), count),
        Candidate("files, Pillow, torchvision", _exhaust(lambda: _folder(stored, 0)), count),
        Candidate("lower bound: decoding only (simplejpeg)", decode_only, count),
    ]
    table = compare(f"Loading, {kind}, one thread", "images", candidates, rounds, by_cpu=True)
    loader.close()
    table.notes += [
        f"All: crops of {_CROP[0]:g} to {_CROP[1]:g} of the area, {_SIZE} x {_SIZE}, half of them mirrored.",
        "Ours also checks each sample's hash and tokenizes its five captions.",
    ]
    return table


def _two_cores(kind: str, stored: _Stored, rounds: int) -> Table:
    """Compare two threads of ours with two worker processes, by wall clock."""
    count, loader, single = len(stored.split), _loader(stored, workers=2), _loader(stored, workers=1)
    images = [stored.split.image(item) for item in range(count)]
    # Their workers persist over the rounds: starting them is not loading.
    webdatasets, folders = (
        _with_workers(_pipeline(stored), stored),
        _with_workers(_Files(stored.files), stored),
    )

    def decode_only() -> None:
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(simplejpeg.decode_jpeg, images):
                pass

    candidates = [
        Candidate("captionscale, 2 threads", _exhaust(lambda: _ours(loader, stored)), count),
        Candidate("captionscale, 1 thread", _exhaust(lambda: _ours(single, stored)), count),
        Candidate("webdataset, 2 worker processes", _exhaust(lambda: iter(webdatasets)), count),
        Candidate("webdataset, in the main process", _exhaust(lambda: _webdataset(stored, 0)), count),
        Candidate("files, 2 worker processes", _exhaust(lambda: iter(folders)), count),
        Candidate("lower bound: decoding only, 2 threads", decode_only, count),
    ]
    table = compare(f"Loading, {kind}, two cores", "images", candidates, rounds)
    loader.close()
    single.close()
    table.notes.append("The processor time of persistent worker processes is not counted.")
    return table


def _exhaust(batches: Callable[[], Iterator[Any]]) -> Callable[[], None]:
    def run() -> None:
        for _ in batches():
            pass

    return run


def _loader(stored: _Stored, workers: int) -> Loader:
    vocabulary = vocab.build(
        ["a man on a bicycle rides down a busy street"], min_count=1, max_vocab_size=None
    )
    settings = {"image_size": _SIZE, "crop_scale": _CROP, "color_jitter": 0.0, "workers": workers}
    data = Data.model_validate({"shards": str(stored.split.storage), **settings})
    return Loader(stored.split, vocabulary, data)


def _ours(loader: Loader, stored: _Stored, epoch: int | None = 0) -> Iterator[Tensor]:
    count = len(loader.split)
    items = np.arange(count) if epoch is None else np.random.default_rng(0).permutation(count)
    requests = ((items[start : start + stored.batch], epoch) for start in range(0, count, stored.batch))
    return (batch.images for batch in loader.prefetch(requests))


def _augmentation() -> v2.Compose:
    """Return the usual torchvision training transforms of a Pillow image."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(_SIZE, scale=_CROP),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
        ]
    )


def _pipeline(stored: _Stored, transform: Callable[[Any], Any] | None = None) -> Any:
    return (
        webdataset.WebDataset(stored.tars, shardshuffle=False, empty_check=False)
        .decode("pilrgb")
        .to_tuple("jpg", "json")
        .map_tuple(transform or _augmentation(), _count_captions)
    )


def _count_captions(sample: dict[str, Any]) -> int:
    return len(sample["captions"])


def _webdataset(
    stored: _Stored, workers: int, transform: Callable[[Any], Any] | None = None
) -> Iterator[Any]:
    return iter(DataLoader(_pipeline(stored, transform), stored.batch, num_workers=workers))


def _folder(stored: _Stored, workers: int) -> Iterator[Any]:
    return iter(DataLoader(_Files(stored.files), stored.batch, shuffle=True, num_workers=workers))


def _with_workers(dataset: Any, stored: _Stored) -> DataLoader[Any]:
    shuffle = True if isinstance(dataset, _Files) else None
    return DataLoader(dataset, stored.batch, shuffle, num_workers=2, persistent_workers=True)


def _check_equal(stored: _Stored) -> str:
    """Compare the center crops of our loader with those of webdataset and torchvision."""

    def center(image: Image.Image) -> Tensor:
        side = min(image.size)
        box = [(image.height - side) // 2, (image.width - side) // 2, side, side]
        view: Tensor = functional.pil_to_tensor(functional.resized_crop(image, *box, [_SIZE, _SIZE]))
        return view

    loader = _loader(stored, workers=1)
    most = mean = 0.0
    pairs = zip(_ours(loader, stored, None), _webdataset(stored, 0, center), strict=True)
    for ours, (theirs, _) in pairs:
        difference = (ours.int() - theirs.int()).abs().float()
        most, mean = max(most, float(difference.max())), max(mean, float(difference.mean()))
    loader.close()
    if most > _MAX_STEPS or mean > _MEAN_STEPS:
        raise UserError(
            f"the candidates' images differ by {most:g} steps of 256 ({mean:.2f} on average), expected at"
            f" most {_MAX_STEPS} ({_MEAN_STEPS}); leave out images that are not RGB or that their EXIF tag"
            " rotates, as only captionscale rotates them"
        )
    return f"Center crops of both resizers differ by {mean:.2f} steps of 256 on average, {most:g} at most."


if __name__ == "__main__":
    main()
