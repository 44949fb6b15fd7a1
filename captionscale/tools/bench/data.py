"""`captionscale bench data`: from shards to batches, beside the ways that people have today."""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from captionscale import vocab
from captionscale.config import Data
from captionscale.data import packing, synthetic
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.progress import say
from captionscale.tools.bench.race import Heat, Way, one_core, race

_SIZE, _BATCH, _CROP = 224, 32, (0.5, 1.0)
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_CAPTIONS = ("A man on a bicycle rides down a busy street.",) * 5
_KINDS = (
    ("shorter side 256", packing.PackOptions(short_side=256, quality=95)),
    ("native size", packing.PackOptions()),
)
# What rounding leaves of one picture in two resizers.
_MOST_STEPS, _MEAN_STEPS = 3, 0.5


@dataclass(frozen=True)
class _Stored:
    """Images as shards, and the same bytes as files."""

    split: Split
    tars: list[str]
    files: list[Path]


class _Files(Dataset[tuple[Tensor, int]]):
    """Image files, as torchvision's ImageFolder reads them."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        with self.files[number].open("rb") as file:
            return _training()(Image.open(file).convert("RGB")), number


def bench(pictures: Path | None, folder: Path | None, *, count: int, rounds: int) -> list[Heat]:
    """Measure loading.

    Args:
        pictures: JPEGs, anywhere below this folder; None: drawn ones.
        folder: Where to write; None: the system's temporary folder. All is in memory when it is read.
        count: Images in a run; the pictures are repeated until there are so many.
        rounds: Of each table.

    Raises:
        UserError: No pictures.
    """
    # Else each way's arithmetic would take all cores.
    with one_core(), tempfile.TemporaryDirectory(dir=folder, prefix="captionscale-bench-") as name:
        records = _records(pictures, Path(name), count)
        heats = []
        for number, (kind, options) in enumerate(_KINDS):
            some = records if options.short_side else records[: max(_BATCH, count // 3)]
            stored = _store(some, Path(name) / str(number), options)
            note = _compare(stored)
            heats += [_one_core(kind, stored, rounds), _two_cores(kind, stored, rounds)]
            heats[-2].notes.append(note)
        return heats


def _records(pictures: Path | None, folder: Path, count: int) -> list[Record]:
    if pictures is None:
        say("note: drawn pictures, which are simpler than photographs; give --images for yours")
        pictures = folder / "drawn"
        synthetic.write_coco(pictures, counts={"train": min(count, 100)}, size=560)
    files = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{pictures}: no .jpg files; wanted a folder of photographs, such as COCO's val2017")
    chosen = [files[number % len(files)] for number in range(count)]
    return [
        Record(number, "train", _CAPTIONS, str(file.parent), file.name) for number, file in enumerate(chosen)
    ]


def _store(records: list[Record], folder: Path, options: packing.PackOptions) -> _Stored:
    """Pack images into four shards, and lay their stored bytes out as files."""
    four = packing.PackOptions(-(-len(records) // 4), short_side=options.short_side, quality=options.quality)
    packing.pack(records, folder / "shards", sources=[], options=four)
    split = Split(folder / "shards", "train")
    files = []
    for item in range(len(split)):
        files.append(folder / f"{item:06d}.jpg")
        files[-1].write_bytes(split.image(item))
    return _Stored(split, [str(folder / "shards" / shard.name) for shard in split.info.shards], files)


def _one_core(kind: str, stored: _Stored, rounds: int) -> Heat:
    data = [stored.split.image(item) for item in range(len(stored.split))]

    def decode_alone() -> None:
        for bits in data:
            simplejpeg.decode_jpeg(bits)

    count, loader = len(stored.split), _loader(stored, workers=1)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (_MEAN, _STD))
    scale, shift = 1 / (255 * std), -mean / std

    def normalised() -> None:
        # As the encoder does it.
        for batch in _ours(loader):
            torch.addcmul(shift, batch.float(), scale)

    ways = [
        Way(
            "captionscale: uint8 batches, which the model normalises", _through(lambda: _ours(loader)), count
        ),
        Way("the same, and normalised on this core", normalised, count),
        Way("webdataset, Pillow, torchvision's transforms", _through(lambda: _webdataset(stored, 0)), count),
        Way("files, Pillow, torchvision's transforms", _through(lambda: _folder(stored, 0)), count),
        Way("the limit: decoding alone (simplejpeg)", decode_alone, count, guarded=False),
    ]
    heat = race(f"Loading, {kind}, one core", "images", ways, rounds, by_cpu=True)
    loader.close()
    heat.notes += [
        f"All: crops of {_CROP[0]:g} to {_CROP[1]:g} of the area, {_SIZE} x {_SIZE}, half of them mirrored.",
        "Ours also proves each image whole and numbers its five captions' words.",
    ]
    return heat


def _two_cores(kind: str, stored: _Stored, rounds: int) -> Heat:
    """Compare two threads of ours with two worker processes, by the clock on the wall."""
    count, loader, single = len(stored.split), _loader(stored, workers=2), _loader(stored, workers=1)
    data = [stored.split.image(item) for item in range(count)]
    # These keep their workers from round to round: starting them is no part of loading.
    webdatasets, folders = _workers(_pipeline(stored)), _workers(_Files(stored.files), shuffle=True)

    def decode_alone() -> None:
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(simplejpeg.decode_jpeg, data):
                pass

    ways = [
        Way("captionscale, 2 threads", _through(lambda: _ours(loader)), count),
        Way("captionscale, 1 thread", _through(lambda: _ours(single)), count, guarded=False),
        Way("webdataset, 2 worker processes", _through(lambda: iter(webdatasets)), count),
        Way("webdataset, in the process itself", _through(lambda: _webdataset(stored, 0)), count),
        Way("files, 2 worker processes", _through(lambda: iter(folders)), count),
        Way("the limit: decoding alone, 2 threads", decode_alone, count, guarded=False),
    ]
    heat = race(f"Loading, {kind}, two cores", "images", ways, rounds)
    loader.close()
    single.close()
    heat.notes.append("Processor time of worker processes that stay is not counted.")
    return heat


def _through(batches: Callable[[], Iterator[Any]]) -> Callable[[], None]:
    def run() -> None:
        for _ in batches():
            pass

    return run


def _loader(stored: _Stored, workers: int) -> Loader:
    vocabulary = vocab.build(list(_CAPTIONS), min_count=1, max_vocab_size=None)
    settings = {"image_size": _SIZE, "crop_scale": _CROP, "color_jitter": 0.0, "workers": workers}
    data = Data.model_validate({"shards": str(stored.split.storage), **settings})
    return Loader(stored.split, vocabulary, data)


def _ours(loader: Loader, epoch: int | None = 0) -> Iterator[Tensor]:
    count = len(loader.split)
    items = np.arange(count) if epoch is None else np.random.default_rng(0).permutation(count)
    requests = ((items[start : start + _BATCH], epoch) for start in range(0, count, _BATCH))
    return (batch.images for batch in loader.prefetch(requests))


def _training() -> v2.Compose:
    """Return what users' training pipelines do to a picture of Pillow's."""
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
        .map_tuple(transform or _training(), _captions)
    )


def _captions(sample: dict[str, Any]) -> int:
    return len(sample["captions"])


def _webdataset(
    stored: _Stored, workers: int, transform: Callable[[Any], Any] | None = None
) -> Iterator[Any]:
    return iter(DataLoader(_pipeline(stored, transform), _BATCH, num_workers=workers))


def _folder(stored: _Stored, workers: int) -> Iterator[Any]:
    return iter(DataLoader(_Files(stored.files), _BATCH, shuffle=True, num_workers=workers))


def _workers(dataset: Any, shuffle: bool | None = None) -> DataLoader[Any]:
    return DataLoader(dataset, _BATCH, shuffle, num_workers=2, persistent_workers=True)


def _compare(stored: _Stored) -> str:
    """Prove that all ways show the same pictures, by their centre views; return what was found."""

    def centre(picture: Image.Image) -> Tensor:
        side = min(picture.size)
        box = [(picture.height - side) // 2, (picture.width - side) // 2, side, side]
        view: Tensor = functional.pil_to_tensor(functional.resized_crop(picture, *box, [_SIZE, _SIZE]))
        return view

    loader = _loader(stored, workers=1)
    most = mean = 0.0
    for ours, (theirs, _) in zip(_ours(loader, None), _webdataset(stored, 0, centre), strict=True):
        difference = (ours.int() - theirs.int()).abs().float()
        most, mean = max(most, float(difference.max())), max(mean, float(difference.mean()))
    loader.close()
    if most > _MOST_STEPS or mean > _MEAN_STEPS:
        raise UserError(
            f"bench data: the ways show other pictures, {most:g} steps of 256 apart ({mean:.2f} on average),"
            f" wanted at most {_MOST_STEPS} ({_MEAN_STEPS}); leave out images that their EXIF tag"
            " turns, or that are not RGB, which only captionscale shows as people see them"
        )
    return f"Centre views of both resizers are {mean:.2f} steps of 256 apart on average, {most:g} at most."
