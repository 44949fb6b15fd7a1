"""Shared by all sources: options, text and JSON files, checks of records."""

import os
import posixpath
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from captionscale import errors, parsing
from captionscale.data.sources.record import Record, sort_records
from captionscale.errors import UserError
from captionscale.files import MB, read_file

# Shards and their indexes hold an id in 64 bits.
ImageId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

# Returns the first image id of splits whose images have no ids.
FirstImageId = Callable[[set[str]], int]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

# Characters of a name in an error: damaged files have names of megabytes.
_LONGEST = 120
# COCO's and Karpathy's files have 150 MB.
_MAX_BYTES = 4096 * MB

_T = TypeVar("_T")


def add_images(parser: ArgumentParser) -> None:
    """Add --images."""
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")


def add_captions(parser: ArgumentParser) -> None:
    """Add --captions, one file."""
    parser.add_argument(
        "--captions", type=Path, required=True, metavar="FILE", help="the data set's caption file"
    )


def add_split(parser: ArgumentParser) -> None:
    """Add --split, of all images."""
    parser.add_argument("--split", default="train", help="name of the split (default: train)")


def add_restval(parser: ArgumentParser) -> None:
    """Add --restval."""
    parser.add_argument(
        "--restval",
        choices=("train", "drop"),
        help="images of COCO's val2014 outside Karpathy's val and test (default: train)",
    )


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors for a file, or a folder and its contents, into user errors.

    Raises:
        UserError: It cannot be opened or read.
    """
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise UserError(f"{place}: {error.strerror}; expected it to be readable; check the path") from error


def decode_utf8(data: bytes, place: str) -> str:
    """Decode UTF-8, without a byte order mark.

    Raises:
        UserError: It is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start} is not UTF-8; expected plain text; unpack it, save it as UTF-8 or"
            " download it again"
        ) from error


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        UserError: It cannot be read, is not UTF-8, or is empty.
    """
    with explain_os_errors(path):
        content = decode_utf8(read_file(path, _MAX_BYTES), str(path))
    if not content.strip():
        raise UserError(f"{path}: the file is empty; expected text; write or download it again")
    return content


def read_json(path: Path, kind: type[_T], expected: str) -> _T:
    """Read a JSON file as a msgspec type; `expected` ends errors: what was expected, and the cure.

    Raises:
        UserError: The file cannot be read, is not JSON, or has another layout.
    """
    with explain_os_errors(path):
        data = read_file(path, _MAX_BYTES)
    return parse_json(data, msgspec.json.Decoder(kind), str(path), expected)


def parse_json(data: bytes, decoder: msgspec.json.Decoder[_T], place: str, expected: str) -> _T:
    """Decode JSON; arguments and errors as in `read_json`."""
    try:
        return parsing.decode(data, decoder)
    except ValueError as error:
        raise UserError(f"{place}: {error}; {expected}") from error


def normalize_path(path: str, place: str) -> str:
    """Normalize an image path relative to the image folder; `place` starts errors.

    Raises:
        UserError: The path leads out of the folder.
    """
    plain = posixpath.normpath(path)
    if plain in (".", "..") or plain.startswith(("/", "../")) or "\0" in plain:
        raise UserError(
            f"{place}: image {path!r:.80}; expected a path below the folder of the images; write it so"
        )
    return plain


def strip_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Strip captions, and drop empty ones."""
    return tuple(caption for raw in captions if (caption := raw.strip()))


def validate_records(
    records: Sequence[Record], images: Path, captions: Path | str, *, require_captions: bool = True
) -> list[Record]:
    """Check that all image files exist, and return the records in the order of shards.

    Args:
        records: Records of image files.
        images: Folder above all of them.
        captions: The caption files, for errors.
        require_captions: Check that each image has captions.

    Raises:
        UserError: There are no records, or an image file or its captions are missing.
    """
    # One listing per folder: checking each of COCO's 118,287 files takes minutes on a cluster's file system.
    there = {str(images): list_folder(images, "the folder of the images")}
    missing = []
    for record in records:
        if require_captions and not record.captions:
            raise UserError(
                f"{captions}: image {record.image_id} ({printable_name(record.name)}) has no captions, or"
                " only empty ones; expected at least one; add a caption or take the image out"
            )
        folder, _, name = f"{record.source}/{record.name}".rpartition("/")
        if folder not in there:
            there[folder] = set()
            # Images of a missing folder are reported by name.
            with suppress(UserError):
                there[folder] = list_folder(Path(folder), "")
        if name not in there[folder]:
            missing.append(f"{folder}/{name}".removeprefix(f"{images}/"))
    if not records:
        raise UserError(f"{captions}: no images; expected at least one; give the file of a whole data set")
    if missing:
        cure = _folder_with(images, missing[0]) or "that holds them, or download them"
        raise UserError(
            f"{images}: {name_some(missing)} of {len(records)} missing; expected each image of {captions};"
            f" give the folder {cure}"
        )
    return sort_records(records)


def list_folder(folder: Path, expected: str) -> set[str]:
    """Return the names in a folder; `expected` describes it in the error.

    Raises:
        UserError: It cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; expected {expected}; check the path") from error


def name_some(names: Sequence[str]) -> str:
    """Return the number of names and the first three, in one line."""
    return errors.describe_images([*map(printable_name, names)])


def printable_name(name: str) -> str:
    """Return a name for a one-line error."""
    return name[:_LONGEST] if name.isprintable() else repr(name[:_LONGEST])


def _folder_with(folder: Path, path: str) -> str | None:
    """Return the folder one level below, or the parent, that holds a missing file."""
    with os.scandir(folder) as entries:
        near = sorted(entry.path for entry in entries if not entry.is_file(follow_symlinks=False))
    near.append(os.path.normpath(folder / ".."))
    # In an unreadable folder, os.path.isfile is False, while Path.is_file raises.
    return next((other for other in near if os.path.isfile(f"{other}/{path}")), None)  # noqa: PTH113
