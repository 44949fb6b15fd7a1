"""Image files for the packing and loading benchmarks: the user's, or synthetic ones."""

import argparse
import shutil
from pathlib import Path

from captionscale.data import synthetic
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.progress import say

_CAPTIONS = ("A man on a bicycle rides down a busy street.",) * 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options --images, --folder and --count."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEG files (default: synthetic images)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write (default: a temporary folder)"
    )
    parser.add_argument("--count", type=int, metavar="N", help="images; files repeat until there are as many")


def copy_images(source: Path | None, folder: Path, count: int) -> list[Record]:
    """Copy JPEG files into `folder/source`, numbered from 0, and return them as records.

    Args:
        source: The files are anywhere below it; None: synthetic images.
        folder: Where to write.
        count: Number of records; files repeat.

    Raises:
        UserError: There are no JPEG files.
    """
    if source is None:
        say("note: synthetic images, which are simpler than real ones; use --images for yours")
        source = folder / "synthetic"
        synthetic.write_coco(source, counts={"train": min(count, 100)}, size=560)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{source}: no .jpg files; expected a folder of images, such as COCO's val2017")
    (folder / "source").mkdir()
    records = []
    for number in range(count):
        record = Record(number, "train", _CAPTIONS, str(folder / "source"), f"{number:012d}.jpg")
        shutil.copyfile(files[number % len(files)], folder / "source" / record.name)
        records.append(record)
    return records
