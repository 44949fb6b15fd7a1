"""Read Flickr8k and Flickr30k, in all layouts of their caption files."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from captionscale.data.sources import base
from captionscale.data.sources.record import Record
from captionscale.data.sources.source import Source
from captionscale.errors import UserError
from captionscale.progress import say

_SPLIT_OF_LIST = {
    "Flickr_8k.trainImages.txt": "train",
    "Flickr_8k.devImages.txt": "val",
    "Flickr_8k.testImages.txt": "test",
    "train.txt": "train",
    "val.txt": "val",
    "test.txt": "test",
}
# Flickr8k.token.txt has captions of this image, which was never published and is in no official list.
_UNPUBLISHED = "2258277193_586949ec62.jpg.1"
# An id must fit 64 bits, so at most eighteen digits.
_NUMBER = re.compile(r"(\d{1,18})\D")
_EXPECTED = (
    "expected image,caption or image_name| comment_number| comment or name.jpg#0<TAB>caption;"
    " give captions.txt, Flickr8k.token.txt, results_20130124.token or results.csv"
)

_EXPECTED_NUMBER = (
    "expected its own number (the image id, 18 digits at most) in front, as in 1000268201_693b08cb0e.jpg"
)

_CSV_LINE = re.compile(r'(?P<name>[^,"]+),(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<caption>[^"].*|))')
# The second bar may be white space: in Kaggle's results.csv the line 2199200615.jpg, 4 lacks it.
_BAR_LINE = re.compile(r"(?P<name>[^|]+)\|\s*(?P<number>\d{1,9})(?:\s*\||\s)(?P<caption>.*)")
_TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#(?P<number>\d{1,9})\t(?P<caption>.*)")


class Flickr(Source):
    """Flickr8k or Flickr30k in its official files."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add --images, --captions and --splits."""
        base.add_options(parser, "images", "captions")
        parser.add_argument(
            "--splits", type=Path, metavar="DIR", help="folder of the official lists of each split's images"
        )

    def read(self, options: Namespace) -> list[Record]:
        """Return the records of the module's function `read`."""
        records = read(options.images, options.captions, options.splits)
        if options.splits is None:
            say(f"note: no --splits, so all {len(records):,} images are in the split 'train'")
        return records

    def files(self, options: Namespace) -> list[Path]:
        """Return the caption file and the split lists."""
        lists = [] if options.splits is None else sorted(options.splits.glob("*.txt"))
        return [options.captions, *(path for path in lists if path.name in _SPLIT_OF_LIST)]


def read(images: Path, captions: Path, splits: Path | None) -> list[Record]:
    """Read Flickr8k or Flickr30k.

    The first line gives the layout: `image,caption` (captions.txt), `image_name| comment_number|
    comment` (results.csv), or `name.jpg#n<TAB>caption` (Flickr8k.token.txt, results_20130124.token).

    `splits` is a folder with `Flickr_8k.{train,dev,test}Images.txt` or `{train,val,test}.txt`; dev is split
    val, and unlisted images are left out. Without it, all images are in train. The image id is the number at
    the start of the file name. Captions are sorted by their number, if they have one.

    Source:
        Hodosh et al. 2013, "Framing Image Description as a Ranking Task" (JAIR 47), Flickr8k;
        Young et al. 2014, "From Image Descriptions to Visual Denotations" (TACL 2), Flickr30k.
    """
    texts: dict[str, list[tuple[int, str]]] = {}
    for name, number, caption in _captions(captions):
        texts.setdefault(name, []).append((number, caption))
    texts.pop(_UNPUBLISHED, None)

    split_of = dict.fromkeys(texts, "train") if splits is None else _splits(splits)
    if unknown := [name for name in split_of if name not in texts]:
        raise UserError(
            f"{splits}: {base.name_some(unknown)} listed, but not in {captions}; expected captions of each"
            " listed image; give lists and captions of one data set"
        )
    source = str(images)
    records: dict[int, Record] = {}
    for name, split in split_of.items():
        number = parse_image_id(name, str(captions))
        if number in records:
            raise UserError(
                f"{captions}: image {base.printable_name(name)} has the number of"
                f" {base.printable_name(records[number].name)}; {_EXPECTED_NUMBER}; rename one"
            )
        # Captions without a number are all 0 and keep the file's order.
        numbered = sorted(texts[name], key=lambda pair: pair[0])
        kept = base.strip_captions(text for _, text in numbered)
        records[number] = Record(number, split, kept, source, name)
    return base.validate_records([*records.values()], images, captions)


def parse_image_id(name: str, place: str) -> int:
    """Return the number at the start of a file name such as `1000268201_693b08cb0e.jpg`."""
    lead = _NUMBER.match(name)
    if not lead:
        raise UserError(
            f"{place}: image {base.printable_name(name)} has no number; {_EXPECTED_NUMBER}; rename it here,"
            " in the lists and in the folder"
        )
    return int(lead[1])


def _captions(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield each caption's image name, number (0 if none) and raw text, in the file's order."""
    lines = base.read_text(path).split("\n")
    if lines[0].strip() == "image,caption":
        layout, start, expected = _CSV_LINE, 1, 'name.jpg,caption or name.jpg,"caption, with commas"'
    elif [field.strip() for field in lines[0].split("|")] == ["image_name", "comment_number", "comment"]:
        layout, start, expected = _BAR_LINE, 1, "name.jpg| number| caption"
    elif _TOKEN_LINE.match(lines[0]):
        layout, start, expected = _TOKEN_LINE, 0, "name.jpg#number<TAB>caption"
    else:
        raise UserError(f"{path}: line 1 is {lines[0]!r:.60}; {_EXPECTED}")
    for number, line in enumerate(lines[start:], start=start + 1):
        if match := layout.fullmatch(line.strip("\r")):
            found = match.groupdict()
            quoted = found.get("quoted")
            caption = found["caption"] if quoted is None else quoted.replace('""', '"')
            name = base.normalize_path(found["name"].strip(), f"{path}: line {number}")
            yield name, int(found.get("number", 0)), caption
        elif line.strip():
            raise UserError(
                f"{path}: line {number} is {line!r:.60}; expected {expected}; correct or delete it"
            )


def _splits(folder: Path) -> dict[str, str]:
    """Return the split of each listed image."""
    names = base.list_folder(folder, "the folder of the split lists")
    if names.isdisjoint(_SPLIT_OF_LIST):
        raise UserError(f"{folder}: no split list; expected {' or '.join(_SPLIT_OF_LIST)}; check the path")
    split_of: dict[str, str] = {}
    for file, split in _SPLIT_OF_LIST.items():
        lines = base.read_text(folder / file).split("\n") if file in names else []
        for line in filter(None, map(str.strip, lines)):
            name = line if line.endswith(".jpg") else f"{line}.jpg"
            base.assign_split(split_of, name, split, f"{folder / file}: {name}")
    return split_of
