"""Read custom data: a table of images and captions, or a folder of images and texts."""

import csv
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import msgspec

from captionscale.data.manifest import SPLIT_NAME
from captionscale.data.packing import first_image_id
from captionscale.data.sources import base
from captionscale.data.sources.record import Record
from captionscale.data.sources.source import Source
from captionscale.errors import UserError
from captionscale.files import MB, open_file
from captionscale.parsing import describe_error
from captionscale.progress import say

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_EXPECTED_COLUMNS = "expected the columns image, caption and, if need be, split and image_id; correct it"
_EXPECTED_OBJECTS = (
    "expected one object a line with image, caption or captions and, if need be, split and image_id;"
    " correct it"
)
_NEEDED, _OPTIONAL = {"image", "caption"}, {"split", "image_id"}

_MAX_LINE_BYTES = 64 * MB


class _Row(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    image: str
    caption: str | list[str] = ""
    captions: tuple[str, ...] = ()
    split: str = ""
    image_id: base.ImageId | None = None


class Table(Source):
    """Your own images by a CSV or JSONL file."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add --images, --captions and --split."""
        base.add_options(parser, "images", "captions", "split")

    def read(self, options: Namespace) -> list[Record]:
        """Return the records of `read_table`."""
        first_id = partial(first_image_id, options.out)
        return read_table(options.captions, options.images, options.split, first_id)

    def files(self, options: Namespace) -> list[Path]:
        """Return the table."""
        return [options.captions]


class Folder(Source):
    """Your own images, each with a .txt of captions next to it, or without captions."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add --images and --split."""
        base.add_options(parser, "images", "split")

    def read(self, options: Namespace) -> list[Record]:
        """Return the records of `read_folder`."""
        return read_folder(options.images, options.split, partial(first_image_id, options.out))


def read_table(captions: Path, images: Path, split: str, first_id: base.FirstImageId) -> list[Record]:
    """Read a table with a caption in each row, as CSV, TSV or JSON lines by the file's ending.

    A `.csv` or `.tsv` starts with its column names: `image`, `caption` and optionally `split` and `image_id`.
    A line of a `.jsonl` or `.ndjson` is an object with these keys; `caption` or `captions` may be a list. The
    captions of an image's rows are joined in order. Without `image_id`, ids are counted from `first_id`.
    """
    found: dict[str, tuple[str, int | None, list[str]]] = {}
    names: dict[int, str] = {}
    for place, row in _rows(captions):
        name = base.normalize_path(row.image, place)
        place = f"{place}: {base.printable_name(name)}"
        row_split = row.split or split
        if not SPLIT_NAME.fullmatch(row_split):
            raise UserError(
                f"{place} is of split {row_split!r:.60}; expected letters, digits, '_' and '-', as in train"
                " or val; rename it"
            )
        known_split, known_id, texts = found.setdefault(name, (row_split, row.image_id, []))
        if row_split != known_split:
            raise UserError(
                f"{place} is of split {row_split!r} here, of {known_split!r} in an earlier row; expected it"
                " in one split, or training sees what is scored; correct one"
            )
        if row.image_id != known_id:
            raise UserError(
                f"{place} has image_id {row.image_id} here, {known_id} in an earlier row; expected one id"
                " for all rows of an image; correct one"
            )
        if row.image_id is not None and names.setdefault(row.image_id, name) != name:
            raise UserError(
                f"{place} has image_id {row.image_id}, which is that of"
                f" {base.printable_name(names[row.image_id])}; expected an id of its own; correct one"
            )
        texts.extend([row.caption] if isinstance(row.caption, str) else row.caption)
        texts.extend(row.captions)
    if names and (without := [name for name, (_, image_id, _) in found.items() if image_id is None]):
        raise UserError(
            f"{captions}: {base.name_some(without)} of {len(found)} without image_id; expected one for each"
            " image or for none; add or delete them"
        )
    first = first_id({row_split for row_split, _, _ in found.values()})
    source = str(images)
    records = []
    for number, (name, (row_split, image_id, texts)) in enumerate(found.items(), start=first):
        key = number if image_id is None else image_id
        records.append(Record(key, row_split, base.strip_captions(texts), source, name))
    return base.validate_records(records, images, captions)


def read_folder(images: Path, split: str, first_id: base.FirstImageId) -> list[Record]:
    """Read images anywhere below a folder, with captions in a `.txt` of the same name next to each.

    Each non-empty line is a caption; without any `.txt`, there are no captions. Links to folders are
    followed; names that start with a dot are skipped. Ids are counted from `first_id`, by sorted paths.
    """
    source = str(images)
    others: list[str] = []
    pairs = sorted(_pairs(images, others))
    if others:
        say(
            f"note: {images}: {len(others):,} files passed over, such as {others[0]}, which is neither an"
            " image of a known kind nor a .txt"
        )
    if not pairs:
        raise UserError(
            f"{images}: no images; expected .{', .'.join(base.IMAGE_EXTENSIONS)} here or below; check the"
            " path"
        )
    without = [path for path, text in pairs if not text]
    if 0 < len(without) < len(pairs):
        raise UserError(
            f"{images}: {base.name_some(without)} of {len(pairs)} without a .txt next to it; expected one for"
            " each image or for none; write them or take the images out"
        )
    records = []
    for image_id, (path, text) in enumerate(pairs, start=first_id({split})):
        lines = base.read_text(images / text).split("\n") if text else []
        records.append(Record(image_id, split, base.strip_captions(lines), source, path))
    return base.validate_records(records, images, images, require_captions=not without)


def _rows(path: Path) -> Iterator[tuple[str, _Row]]:
    """Yield each row with its place, for errors."""
    ending = path.suffix.lower()
    if ending in _DELIMITERS:
        yield from _delimited_rows(path, _DELIMITERS[ending])
    elif ending in _JSON_LINES:
        decoder = msgspec.json.Decoder(_Row)
        for place, line in _lines(path):
            if line.strip():
                yield place, base.parse_json(line, decoder, place, _EXPECTED_OBJECTS)
    else:
        endings = ", ".join((*_DELIMITERS, *_JSON_LINES))
        raise UserError(f"{path}: a table's ending gives its layout; expected {endings}; rename it")


def _delimited_rows(path: Path, delimiter: str) -> Iterator[tuple[str, _Row]]:
    lines = (base.decode_utf8(line, place) for place, line in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(header) != len(set(header)) or not _NEEDED <= set(header) <= _NEEDED | _OPTIONAL:
            raise UserError(f"{path}: line 1 is {delimiter.join(header)!r:.80}; {_EXPECTED_COLUMNS}")
        for fields in filter(None, reader):
            place = f"{path}: line {reader.line_num}"
            if len(fields) != len(header):
                raise UserError(
                    f"{place} has {len(fields)} fields; expected {len(header)} as in line 1; put a caption"
                    f" with {delimiter!r} in quotes"
                )
            cells = {column: field for column, field in zip(header, fields, strict=True) if field}
            yield place, msgspec.convert(cells, _Row, strict=False)
    except (msgspec.ValidationError, csv.Error) as error:
        if isinstance(error, csv.Error):
            fault = f"{error}; expected a field with quotes in quotes, and each quote in it twice; correct it"
        else:
            fault = f"{describe_error(error)}; {_EXPECTED_COLUMNS}"
        raise UserError(f"{path}: line {reader.line_num}: {fault}") from error


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with base.explain_os_errors(path), open_file(path) as file:
        for number in count(1):
            line = file.readline(_MAX_LINE_BYTES)
            place = f"{path}: line {number}"
            if len(line) == _MAX_LINE_BYTES:
                raise UserError(
                    f"{place}: {_MAX_LINE_BYTES:,} bytes or more, expected the row of one image; correct it"
                )
            if not line:
                return
            yield place, line


def _pairs(images: Path, others: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each image's path, and the path of its text or ""; other files go into `others`."""
    seen: dict[tuple[int, int], str] = {}
    with base.explain_os_errors(images):
        for folder, inner, names in os.walk(images, onerror=_raise, followlinks=True):
            status = os.stat(folder)  # noqa: PTH116
            if (known := seen.setdefault((status.st_dev, status.st_ino), folder)) != folder:
                raise UserError(
                    f"{folder}: leads to {known} again; expected each folder once; delete the link"
                )
            inner[:] = [name for name in inner if not name.startswith(".")]
            start = os.path.relpath(folder, images)
            texts = {name[: -len(".txt")]: name for name in names if name.lower().endswith(".txt")}
            of_text: dict[str, str] = {}
            for name in names:
                stem, _, ending = name.rpartition(".")
                if name.startswith(".") or ending.lower() == "txt":
                    continue
                if ending.lower() not in base.IMAGE_EXTENSIONS:
                    others.append(base.printable_name(name))
                    continue
                text = texts.get(stem, "")
                if text and (other := of_text.setdefault(text, name)) != name:
                    raise UserError(
                        f"{folder}/{text}: next to {other} and {name}; expected a name of its own for each"
                        " image; rename one"
                    )
                yield os.path.normpath(f"{start}/{name}"), text and os.path.normpath(f"{start}/{text}")


def _raise(error: OSError) -> None:
    raise error
