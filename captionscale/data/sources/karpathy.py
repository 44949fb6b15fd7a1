"""Read Karpathy's JSON files: captions and splits of COCO 2014, Flickr8k and Flickr30k in one layout."""

import posixpath
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Literal

import msgspec

from captionscale.data.sources import base, flickr
from captionscale.data.sources.record import Record
from captionscale.data.sources.source import Source
from captionscale.errors import UserError

_EXPECTED = (
    "expected Karpathy's layout: 'dataset', and 'images' with filename, split, sentences with raw, and for"
    " COCO cocoid and filepath; give dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json"
)


class _Sentence(msgspec.Struct, gc=False):
    raw: str


class _Image(msgspec.Struct, gc=False):
    filename: str
    split: Literal["train", "val", "test", "restval"]
    sentences: list[_Sentence]
    filepath: str = ""
    cocoid: base.ImageId | None = None


class _Document(msgspec.Struct, gc=False):
    dataset: Literal["coco", "flickr8k", "flickr30k"]
    images: list[_Image]


class Karpathy(Source):
    """COCO, Flickr8k or Flickr30k by Karpathy's dataset_*.json."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add --images, --captions and --restval."""
        base.add_options(parser, "images", "captions", "restval")

    def read(self, options: Namespace) -> list[Record]:
        """Return the records of the module's function `read`."""
        return read(options.images, options.captions, options.restval or "train")

    def files(self, options: Namespace) -> list[Path]:
        """Return the JSON file."""
        return [options.captions]


def read(images: Path, captions: Path, restval: Literal["train", "drop"]) -> list[Record]:
    """Read one of Karpathy's three files.

    Args:
        images: Folder with `train2014` and `val2014` for COCO, or with the image files for Flickr.
        captions: `dataset_coco.json`, `dataset_flickr8k.json` or `dataset_flickr30k.json`.
        restval: COCO's 30,504 `restval` images: `train` as in most papers, or `drop` to leave them out.

    Source:
        Karpathy & Fei-Fei 2015, "Deep Visual-Semantic Alignments" (arXiv:1412.2306).
    """
    document = base.read_json(captions, _Document, _EXPECTED)
    records: dict[int, Record] = {}
    for number, image in enumerate(document.images):
        place = f"{captions}: images[{number}]"
        if document.dataset != "coco":
            image_id = flickr.parse_image_id(image.filename, place)
        elif image.cocoid is not None:
            image_id = image.cocoid
        else:
            raise UserError(f"{place} has no cocoid; {_EXPECTED}")
        if image_id in records:
            raise UserError(f"{place} repeats image id {image_id}; expected each id once; delete one")
        split = restval if image.split == "restval" else image.split
        path, texts = posixpath.join(image.filepath, image.filename), [it.raw for it in image.sentences]
        records[image_id] = base.make_record(image_id, split, texts, images, path, place)
    kept = [record for record in records.values() if record.split != "drop"]
    return base.validate_records(kept, images, captions)
