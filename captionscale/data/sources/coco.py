"""Read COCO's captions: the official files, by their own splits or by Karpathy's lists."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from captionscale.data.sources import base
from captionscale.data.sources.record import Record
from captionscale.data.sources.source import Source
from captionscale.errors import UserError

_WANTED = (
    "wanted COCO captions: 'images' with id and file_name, 'annotations' with image_id and caption;"
    " give captions_train2017.json or its like, not instances_* or Karpathy's dataset_*.json"
)
_SPLITS = ("train", "val", "test")
_NAME_2014 = re.compile(r"COCO_((?:train|val)2014)_(\d{12})\.jpg")
_BOTH_FILES = "give captions_train2014.json and captions_val2014.json"
_LIST_LINE = re.compile(r"(?P<path>\S+)[ \t]+(?P<image_id>\d{1,18})")


class _Image(msgspec.Struct, gc=False):
    id: base.ImageId
    file_name: str


class _Annotation(msgspec.Struct, gc=False):
    image_id: base.ImageId
    caption: str


class _Document(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Annotation] | msgspec.UnsetType = msgspec.UNSET


class Coco(Source):
    """COCO 2014 or 2017 in its official files, or 2014 by lists of Karpathy's split."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add --images, --captions, --lists, --restval and --split."""
        base.add_images(parser)
        parser.add_argument(
            "--captions",
            type=Path,
            nargs="+",
            required=True,
            metavar="FILE",
            help="official file; with --lists, both of 2014",
        )
        parser.add_argument(
            "--lists", type=Path, metavar="DIR", help="folder of karpathy_{train,val,test}_images.txt"
        )
        base.add_restval(parser)
        parser.add_argument("--split", help="name of the split")

    def read(self, options: Namespace) -> list[Record]:
        """Return the records of `read_official`, or with --lists of `read_karpathy_lists`."""
        if options.lists:
            if options.split is not None:
                raise UserError(
                    "pack coco: found --split with --lists, expected one of them; leave out --split"
                )
            return read_karpathy_lists(
                options.images, options.captions, options.lists, options.restval or "train"
            )
        if options.split is None or len(options.captions) != 1 or options.restval is not None:
            raise UserError(
                "pack coco: expected one --captions file with its --split, or both files of 2014 with"
                " --lists; --restval only with --lists"
            )
        return read_official(options.images, options.captions[0], options.split)

    def files(self, options: Namespace) -> list[Path]:
        """Return the caption files and lists."""
        lists = sorted(options.lists.glob("karpathy_*_images.txt")) if options.lists else []
        return [*options.captions, *lists]


def read_official(images: Path, captions: Path, split: str) -> list[Record]:
    """Read COCO of 2014 or 2017 as it is published, two layouts that differ in nothing but the file names.

    Args:
        images: The folder that holds the image files themselves, such as `train2017`.
        captions: The captions JSON of one split, such as `captions_train2017.json`, or a list of images
            without captions, such as `image_info_test2014.json`.
        split: The split that all its images get.

    Returns:
        The records by image id. Empty captions are dropped. There are none at all if the file has no
        annotations.

    Raises:
        UserError: If a file is missing, broken or of another layout, an image id repeats, a caption
            belongs to no image, or an image has no captions although others have.

    Source:
        Chen et al. 2015, "Microsoft COCO Captions" (arXiv:1504.00325).
    """
    names, texts = _read(captions)
    source = cache(lambda folder: str(images / folder))
    records = []
    for image_id, path in names.items():
        folder, _, name = base.normalize_path(path, f"{captions}: image {image_id}").rpartition("/")
        kept = base.strip_captions(texts.pop(image_id)) if texts else ()
        records.append(Record(image_id, split, kept, source(folder), name))
    return base.validate_records(records, images, captions, require_captions=texts is not None)


def read_karpathy_lists(
    images: Path, captions: Sequence[Path], lists: Path, restval: Literal["train", "drop"]
) -> list[Record]:
    """Read COCO 2014 by the splits that nearly every paper scores on, from the official annotations.

    Args:
        images: The folder that holds `train2014` and `val2014`.
        captions: `captions_train2014.json` and `captions_val2014.json`.
        lists: The folder with `karpathy_{train,val,test}_images.txt`, lines such as
            `val2014/COCO_val2014_000000391895.jpg 391895`. Without the list of train, every image that is
            in no other list is of train; with it, images in no list are left out.
        restval: What becomes of the images of train that are in `val2014`, 30,504 in all: `train` as most
            papers do, or `drop` to leave them out.

    Returns:
        The records by split and image id.

    Raises:
        UserError: As `read_official` does; and if the list of val or test is missing, a list has a line of
            another form or an image of no annotation, an image is in two lists, or an id differs from its
            file name's number.

    Source:
        Karpathy & Fei-Fei 2015, "Deep Visual-Semantic Alignments" (arXiv:1412.2306).
    """
    paths: dict[int, tuple[str, str]] = {}
    texts: dict[int, list[str]] = {}
    for file in captions:
        names, found = _captioned(file)
        if both := names.keys() & paths.keys():
            raise UserError(
                f"{file}: image {min(both)} is in another file too; wanted it once; {_BOTH_FILES}"
            )
        paths |= {image_id: _path_2014(file, image_id, name) for image_id, name in names.items()}
        texts |= found
    place = " and ".join(map(str, captions))
    if {folder for folder, _ in paths.values()} != {"train2014", "val2014"}:
        raise UserError(f"{place}: wanted images of train2014 and of val2014 both; {_BOTH_FILES}")
    listed = _listed(lists, paths)
    rest = None if "train" in listed.values() else "train"
    source = {folder: str(images / folder) for folder in ("train2014", "val2014")}
    records = []
    for image_id, (folder, name) in paths.items():
        split = listed.get(image_id, rest)
        if split and not (split == "train" and folder == "val2014" and restval == "drop"):
            kept = base.strip_captions(texts[image_id])
            records.append(Record(image_id, split, kept, source[folder], name))
    return base.validate_records(records, images, place)


def read_references(captions: Path) -> dict[int, list[str]]:
    """Read the captions of a COCO captions JSON alone, by image id; no image need be there.

    Args:
        captions: Such as `captions_val2014.json`.

    Raises:
        UserError: As `read_official` does for its caption file, or it has no annotations.
    """
    return _captioned(captions)[1]


def _read(captions: Path) -> tuple[dict[int, str], dict[int, list[str]] | None]:
    """Return the file name and, unless the file has no annotations, the raw captions of each image id."""
    document = base.read_json(captions, _Document, _WANTED)
    names: dict[int, str] = {}
    for number, image in enumerate(document.images):
        if image.id in names:
            raise UserError(
                f"{captions}: images[{number}] repeats image id {image.id}; wanted each id once; delete one"
            )
        names[image.id] = image.file_name
    if document.annotations is msgspec.UNSET:
        return names, None
    texts: dict[int, list[str]] = {image_id: [] for image_id in names}
    for number, annotation in enumerate(document.annotations):
        if annotation.image_id not in texts:
            raise UserError(
                f"{captions}: annotations[{number}] has image_id {annotation.image_id}, which is not in"
                " 'images'; wanted one that is; delete the caption or add its image"
            )
        texts[annotation.image_id].append(annotation.caption)
    return names, texts


def _captioned(captions: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    names, texts = _read(captions)
    if texts is None:
        raise UserError(f"{captions}: no list 'annotations'; {_WANTED}")
    return names, texts


def _path_2014(place: Path, image_id: int, name: str) -> tuple[str, str]:
    """Return the folder and the name of one of COCO 2014's images, told by the name."""
    found = _NAME_2014.fullmatch(name)
    if not found or int(found[2]) != image_id:
        raise UserError(
            f"{place}: image {image_id} has the file name {name!r:.60}; wanted COCO 2014's, as in"
            f" COCO_val2014_000000391895.jpg of image 391895; {_BOTH_FILES}"
        )
    return found[1], name


def _listed(lists: Path, paths: dict[int, tuple[str, str]]) -> dict[int, str]:
    """Return the split of each listed image id."""
    split_of: dict[int, str] = {}
    there = base.list_folder(lists, "the folder of Karpathy's lists")
    for split in _SPLITS:
        file = lists / f"karpathy_{split}_images.txt"
        # Without this one list the others still say all; without them, training would see what is scored.
        if split == "train" and file.name not in there:
            continue
        for number, line in enumerate(base.read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            place = f"{file}: line {number}"
            found = _LIST_LINE.fullmatch(line.strip())
            if not found:
                raise UserError(
                    f"{place} is {line!r:.60}; wanted val2014/COCO_val2014_000000391895.jpg 391895; fix it"
                )
            image_id = int(found["image_id"])
            if "/".join(paths.get(image_id, ())) != found["path"]:
                raise UserError(
                    f"{place} names {found['path']} {image_id}; wanted an image of the annotations with"
                    " its own id; give lists and captions of one data set"
                )
            if split_of.setdefault(image_id, split) != split:
                raise UserError(
                    f"{place}: image {image_id} is in the list of {split_of[image_id]} too; wanted it in one"
                    " split, or training sees what is scored; delete it from one"
                )
    return split_of
