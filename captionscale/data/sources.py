"""Read the caption data sets from their own files: one reader for COCO, one for Flickr8k and Flickr30k.

A reader gives facts only: captions stay as people wrote them, and no image is opened.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captionscale.errors import UserError

_SPLIT_ORDER = {"train": 0, "val": 1, "test": 2}

_COCO_WANTED = (
    "wanted COCO captions: 'images' with id and file_name, 'annotations' with image_id and caption;"
    " give captions_train2017.json or its like, not instances_*, image_info_* or Karpathy's dataset_*.json"
)

_FLICKR_LISTS = {
    "Flickr_8k.trainImages.txt": "train",
    "Flickr_8k.devImages.txt": "val",
    "Flickr_8k.testImages.txt": "test",
    "train.txt": "train",
    "val.txt": "val",
    "test.txt": "test",
}
# Flickr8k.token.txt has captions of this image, which was never published and is in no official list.
_FLICKR_UNPUBLISHED = "2258277193_586949ec62.jpg.1"
# An id must fit 64 bits, so at most eighteen digits.
_FLICKR_NUMBER = re.compile(r"(\d{1,18})\D")
_FLICKR_WANTED = (
    "wanted image,caption or image_name| comment_number| comment or name.jpg#0<TAB>caption;"
    " give captions.txt, Flickr8k.token.txt, results_20130124.token or results.csv"
)

_CSV_LINE = re.compile(r'(?P<name>[^,"]+),(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<caption>[^"].*|))')
# The second bar may be white space: in Kaggle's results.csv the line 2199200615.jpg, 4 lacks it.
_BAR_LINE = re.compile(r"(?P<name>[^|]+)\|\s*(?P<number>\d{1,9})(?:\s*\||\s)(?P<caption>.*)")
_TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#(?P<number>\d{1,9})\t(?P<caption>.*)")


@dataclass(frozen=True)
class Record:
    """One image of a data set with all its captions.

    Attributes:
        image_id: The data set's own number of the image.
        file: Where the original bytes are.
        split: The part of the data set: train, val, test, or another name that the caller gave.
        captions: Raw texts in the data set's order, without surrounding white space; at least one.
    """

    image_id: int
    file: Path
    split: str
    captions: tuple[str, ...]


def coco(images: Path, captions: Path, split: str) -> list[Record]:
    """Read COCO captions of 2014 or 2017, two layouts that differ in nothing but the file names.

    Args:
        images: The folder that holds the image files themselves, such as `train2017`.
        captions: The captions JSON of one split, such as `captions_train2017.json`.
        split: The split that all its images get.

    Returns:
        The records by image id. Empty captions are dropped.

    Raises:
        UserError: If a file is missing, broken or of another layout, an image id repeats, a caption
            belongs to no image, or an image has no captions.

    Source:
        Chen et al. 2015, "Microsoft COCO Captions" (arXiv:1504.00325).
    """
    names, texts = _coco_captions(captions)
    return _records(images, captions, ((key, name, split, texts[key]) for key, name in names.items()))


def coco_references(captions: Path) -> dict[int, list[str]]:
    """Read the captions of a COCO captions JSON alone, by image id; no image need be there.

    Args:
        captions: Such as `captions_val2014.json`.

    Raises:
        UserError: As `coco` does for its caption file.
    """
    return _coco_captions(captions)[1]


def flickr(images: Path, captions: Path, splits: Path | None, split: str = "train") -> list[Record]:
    """Read Flickr8k or Flickr30k, whichever way its captions were written down.

    The layout is told by the first line: `image,caption` (captions.txt), `image_name| comment_number|
    comment` (results.csv), or `name.jpg#n<TAB>caption` (Flickr8k.token.txt, results_20130124.token).

    Args:
        images: The folder that holds the image files themselves.
        captions: The caption file.
        splits: The folder with the lists `Flickr_8k.{train,dev,test}Images.txt` or `{train,val,test}.txt`.
            Those that are there are used, dev as split val; images in no list are left out.
        split: The split that all images get when `splits` is None.

    Returns:
        The records by split (train, val, test) and image id, which is the number that leads the file name.
        Captions stand by their number where they have one. Empty captions are dropped, and so is the one
        image of Flickr8k.token.txt that was never published, `2258277193_586949ec62.jpg.1`.

    Raises:
        UserError: If a file is missing, broken or of another layout, an image is in two lists, or an
            image has no captions, no number or the number of another one.

    Source:
        Hodosh et al. 2013, "Framing Image Description as a Ranking Task" (JAIR 47), Flickr8k;
        Young et al. 2014, "From Image Descriptions to Visual Denotations" (TACL 2), Flickr30k.
    """
    texts: dict[str, list[tuple[int, str]]] = {}
    for name, number, caption in _flickr_captions(captions):
        texts.setdefault(name, []).append((number, caption))
    texts.pop(_FLICKR_UNPUBLISHED, None)

    split_of = dict.fromkeys(texts, split) if splits is None else _flickr_splits(splits)
    if unknown := [name for name in split_of if name not in texts]:
        raise UserError(
            f"{splits}: {_some(unknown)} listed, but not in {captions}; wanted captions of each listed image;"
            " give lists and captions of one data set"
        )
    names: dict[int, str] = {}
    for name in split_of:
        lead = _FLICKR_NUMBER.match(name)
        if not lead or names.setdefault(int(lead[1]), name) != name:
            found = f"has the number of {names[int(lead[1])]}" if lead else "has no number"
            raise UserError(
                f"{captions}: image {name!r} {found}; wanted its own number (the image id, 18 digits at most)"
                " in front, as in 1000268201_693b08cb0e.jpg; rename it here, in the lists and in the folder"
            )
    for numbered in texts.values():
        # By number alone: those without a number are all 0 and keep the file's order.
        numbered.sort(key=lambda pair: pair[0])
    rows = ((key, name, split_of[name], [text for _, text in texts[name]]) for key, name in names.items())
    return _records(images, captions, rows)


def _coco_captions(captions: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return the file name and the raw captions of each image id."""
    try:
        document = json.loads(_text(captions))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{captions}: not JSON: {error}; wanted a whole file; download it again") from error
    names: dict[int, str] = {}
    texts: dict[int, list[str]] = {}
    for where, image in _coco_items(captions, document, "images"):
        image_id = _coco_field(where, image, "id", int)
        if image_id in names:
            raise UserError(f"{where} repeats image id {image_id}; wanted each id once; delete one")
        names[image_id] = _coco_field(where, image, "file_name", str)
        texts[image_id] = []
    for where, annotation in _coco_items(captions, document, "annotations"):
        caption = _coco_field(where, annotation, "caption", str)
        image_id = _coco_field(where, annotation, "image_id", int)
        if image_id not in texts:
            raise UserError(
                f"{where} has image_id {image_id}, which is not in 'images'; wanted one that is;"
                " delete the caption or add its image"
            )
        texts[image_id].append(caption)
    return names, texts


def _records(images: Path, captions: Path, rows: Iterable[tuple[int, str, str, list[str]]]) -> list[Record]:
    """Turn rows of (image id, file name, split, raw captions) into records, proven complete and in order."""
    # One listing: to ask for each of COCO's 118,287 files takes minutes on a cluster's file system.
    there = _listing(images, "the folder of the images")
    records, missing = [], []
    for image_id, name, split, texts in rows:
        kept = tuple(text for raw in texts if (text := raw.strip()))
        if not kept:
            found = "has only empty captions" if texts else "has no captions"
            raise UserError(
                f"{captions}: image {image_id} {found}; wanted at least one; add a caption or take {name} out"
            )
        records.append(Record(image_id, images / name, split, kept))
        if name not in there:
            missing.append(name)
    if not records:
        raise UserError(f"{captions}: no images; wanted at least one; give the file of a whole data set")
    if missing:
        inner = _subfolder(images, missing[0])
        raise UserError(
            f"{images}: {_some(missing)} of {len(records)} missing; wanted each image of {captions};"
            f" give the folder {inner or 'that holds them, or download them'}"
        )
    return sorted(records, key=lambda it: (_SPLIT_ORDER.get(it.split, 3), it.split, it.image_id))


def _subfolder(folder: Path, name: str) -> str | None:
    with os.scandir(folder) as entries:
        inner = sorted(entry.path for entry in entries if entry.is_dir())
    # os.path.isfile is False for a folder that may not be read, where Path.is_file raises.
    return next((path for path in inner if os.path.isfile(f"{path}/{name}")), None)  # noqa: PTH113


def _listing(folder: Path, wanted: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; wanted {wanted}; check the path") from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} image{'s' if len(names) > 1 else ''} ({shown})"


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; wanted a text file; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8; wanted plain text; unpack it or download it again"
        ) from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty; wanted text; download it again")
    return text


def _coco_items(path: Path, document: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield each item of one list of a COCO file after the words that say where it is."""
    items = document.get(key) if isinstance(document, dict) else None
    if not isinstance(items, list):
        found = ", ".join(sorted(document)[:9]) if isinstance(document, dict) else type(document).__name__
        raise UserError(f"{path}: no list {key!r} (found {found}); {_COCO_WANTED}")
    for number, item in enumerate(items):
        yield f"{path}: {key}[{number}]", item


def _coco_field(where: str, item: Any, key: str, kind: type) -> Any:
    value = item.get(key) if isinstance(item, dict) else None
    if type(value) is not kind:
        found = f"no {key!r}" if value is None else f"{key!r}: {value!r:.60}"
        raise UserError(f"{where} has {found}; {_COCO_WANTED}")
    return value


def _flickr_captions(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield each caption's image name, number (0 where it has none) and raw text, in the file's order."""
    lines = _text(path).split("\n")
    if lines[0].strip() == "image,caption":
        layout, start, wanted = _CSV_LINE, 1, 'name.jpg,caption or name.jpg,"caption, with commas"'
    elif [field.strip() for field in lines[0].split("|")] == ["image_name", "comment_number", "comment"]:
        layout, start, wanted = _BAR_LINE, 1, "name.jpg| number| caption"
    elif _TOKEN_LINE.match(lines[0]):
        layout, start, wanted = _TOKEN_LINE, 0, "name.jpg#number<TAB>caption"
    else:
        raise UserError(f"{path}: line 1 is {lines[0]!r:.60}; {_FLICKR_WANTED}")
    for number, line in enumerate(lines[start:], start=start + 1):
        if match := layout.fullmatch(line.strip("\r")):
            found = match.groupdict()
            quoted = found.get("quoted")
            caption = found["caption"] if quoted is None else quoted.replace('""', '"')
            yield found["name"].strip(), int(found.get("number", 0)), caption
        elif line.strip():
            raise UserError(f"{path}: line {number} is {line!r:.60}; wanted {wanted}; correct or delete it")


def _flickr_splits(folder: Path) -> dict[str, str]:
    """Return the split of each listed image."""
    there = _listing(folder, "the folder of the split lists")
    if there.isdisjoint(_FLICKR_LISTS):
        raise UserError(f"{folder}: no split list; wanted {' or '.join(_FLICKR_LISTS)}; check the path")
    split_of: dict[str, str] = {}
    for file, split in _FLICKR_LISTS.items():
        lines = _text(folder / file).split("\n") if file in there else []
        for line in filter(None, map(str.strip, lines)):
            name = line if line.endswith(".jpg") else f"{line}.jpg"
            if split_of.setdefault(name, split) != split:
                raise UserError(
                    f"{folder / file}: {name} is in a {split_of[name]} list too; wanted it in one split,"
                    " or training sees what is scored; delete it from one"
                )
    return split_of
