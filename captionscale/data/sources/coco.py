"""Read COCO's captions: the official files, by their own splits or by Karpathy's lists."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from captionscale.data.sources import base
from captionscale.data.sources.record import Record
from captionscale.data.sources.source import Source
from captionscale.errors import UserError

_EXPECTED = (
    "expected COCO captions: 'images' with id and file_name, 'annotations' with image_id and caption;"
    " give captions_train2017.json or its like, not instances_* or Karpathy's dataset_*.json"
)
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
        base.add_options(parser, "images")
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
        base.add_options(parser, "restval")
        parser.add_argument("--split", help="name of the split")

    def read(self, options: Namespace) -> list[Record]:
        """Return the records of `read_official`, or with --lists of `read_karpathy_lists`."""
        images, captions = options.images, options.captions
        if options.lists:
            if options.split is not None:
                raise UserError(
                    "pack coco: found --split with --lists, expected one of them; leave out --split"
                )
            return read_karpathy_lists(images, captions, options.lists, options.restval or "train")
        if options.split is None or len(captions) != 1 or options.restval is not None:
            raise UserError(
                "pack coco: expected one --captions file with its --split, or both files of 2014 with"
                " --lists; --restval only with --lists"
            )
        return read_official(images, captions[0], options.split)

    def files(self, options: Namespace) -> list[Path]:
        """Return the caption files and lists."""
        lists = sorted(options.lists.glob("karpathy_*_images.txt")) if options.lists else []
        return [*options.captions, *lists]


def read_official(images: Path, captions: Path, split: str) -> list[Record]:
    """Read a split of COCO 2014 or 2017 in its official files.

    A list of images without captions, such as `image_info_test2014.json`, is read too.

    Source:
        Chen et al. 2015, "Microsoft COCO Captions" (arXiv:1504.00325).
    """
    names, texts = _read(captions)
    records = []
    for image_id, path in names.items():
        own = texts.pop(image_id) if texts else []
        records.append(base.make_record(image_id, split, own, images, path, f"{captions}: image {image_id}"))
    return base.validate_records(records, images, captions, require_captions=texts is not None)


def read_karpathy_lists(
    images: Path, captions: Sequence[Path], lists: Path, restval: Literal["train", "drop"]
) -> list[Record]:
    """Read COCO 2014 by Karpathy's splits, from the official annotations.

    Args:
        images: Folder with `train2014` and `val2014`.
        captions: `captions_train2014.json` and `captions_val2014.json`.
        lists: Folder with `karpathy_{train,val,test}_images.txt`. Without a train list, all unlisted images
            are in train; with it, they are left out.
        restval: The 30,504 train images in `val2014`: `train` as in most papers, or `drop` to leave them out.

    Source:
        Karpathy & Fei-Fei 2015, "Deep Visual-Semantic Alignments" (arXiv:1412.2306).
    """
    paths: dict[int, str] = {}
    texts: dict[int, list[str]] = {}
    for file in captions:
        names, found = _read_captioned(file)
        if both := names.keys() & paths.keys():
            raise UserError(
                f"{file}: image {min(both)} is in another file too; expected it once; {_BOTH_FILES}"
            )
        paths |= {image_id: _path_2014(file, image_id, name) for image_id, name in names.items()}
        texts |= found
    place = " and ".join(map(str, captions))
    if {path.partition("/")[0] for path in paths.values()} != {"train2014", "val2014"}:
        raise UserError(f"{place}: expected images of train2014 and of val2014 both; {_BOTH_FILES}")
    listed = _read_lists(lists, paths)
    rest = None if "train" in listed.values() else "train"
    records = []
    for image_id, path in paths.items():
        split = listed.get(image_id, rest)
        if split and not (split == "train" and path.startswith("val2014") and restval == "drop"):
            records.append(base.make_record(image_id, split, texts[image_id], images, path, place))
    return base.validate_records(records, images, place)


def read_references(captions: Path) -> dict[int, list[str]]:
    """Read the captions of a file such as `captions_val2014.json` by image id, without images."""
    return _read_captioned(captions)[1]


def _read(captions: Path) -> tuple[dict[int, str], dict[int, list[str]] | None]:
    """Return file names and, if the file has annotations, raw captions by image id."""
    document = base.read_json(captions, _Document, _EXPECTED)
    names: dict[int, str] = {}
    for number, image in enumerate(document.images):
        if image.id in names:
            raise UserError(
                f"{captions}: images[{number}] repeats image id {image.id}; expected each id once; delete one"
            )
        names[image.id] = image.file_name
    if document.annotations is msgspec.UNSET:
        return names, None
    texts: dict[int, list[str]] = {image_id: [] for image_id in names}
    for number, annotation in enumerate(document.annotations):
        if annotation.image_id not in texts:
            raise UserError(
                f"{captions}: annotations[{number}] has image_id {annotation.image_id}, which is not in"
                " 'images'; expected one that is; delete the caption or add its image"
            )
        texts[annotation.image_id].append(annotation.caption)
    return names, texts


def _read_captioned(captions: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    names, texts = _read(captions)
    if texts is None:
        raise UserError(f"{captions}: no list 'annotations'; {_EXPECTED}")
    return names, texts


def _path_2014(place: Path, image_id: int, name: str) -> str:
    """Return folder and file name of a COCO 2014 image."""
    found = _NAME_2014.fullmatch(name)
    if not found or int(found[2]) != image_id:
        raise UserError(
            f"{place}: image {image_id} has the file name {name!r:.60}; expected COCO 2014's, as in"
            f" COCO_val2014_000000391895.jpg of image 391895; {_BOTH_FILES}"
        )
    return f"{found[1]}/{name}"


def _read_lists(lists: Path, paths: dict[int, str]) -> dict[int, str]:
    """Return the split of each listed image id."""
    split_of: dict[int, str] = {}
    names = base.list_folder(lists, "the folder of Karpathy's lists")
    for split in ("train", "val", "test"):
        file = lists / f"karpathy_{split}_images.txt"
        # Only the train list is optional: without the others, training would see scored images.
        if split == "train" and file.name not in names:
            continue
        for number, line in enumerate(base.read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            place = f"{file}: line {number}"
            found = _LIST_LINE.fullmatch(line.strip())
            if not found:
                raise UserError(
                    f"{place} is {line!r:.60}; expected val2014/COCO_val2014_000000391895.jpg 391895; fix it"
                )
            image_id = int(found["image_id"])
            if paths.get(image_id) != found["path"]:
                raise UserError(
                    f"{place} names {found['path']} {image_id}; expected an image of the annotations with"
                    " its own id; give lists and captions of one data set"
                )
            base.assign_split(split_of, image_id, split, f"{place}: image {image_id}")
    return split_of
