"""Shared by all sources: options, text and JSON files, checks of records."""

import os
import posixpath
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

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

_OPTIONS: dict[str, dict[str, Any]] = {
    "images": {"type": Path, "required": True, "metavar": "DIR", "help": "folder of the image files"},
    "captions": {"type": Path, "required": True, "metavar": "FILE", "help": "the data set's caption file"},
    "split": {"default": "train", "help": "name of the split (default: train)"},
    "restval": {
        "choices": ("train", "drop"),
        "help": "images of COCO's val2014 outside Karpathy's val and test (default: train)",
    },
}

# Characters of a name in an error: damaged files have names of megabytes.
_LONGEST = 120
# COCO's and Karpathy's files have 150 MB.
_MAX_BYTES = 4096 * MB

_T = TypeVar("_T")


def add_options(parser: ArgumentParser, *names: str) -> None:
    """Add options that several sources have."""
    for name in names:
        parser.add_argument(f"--{name}", **_OPTIONS[name])


@contextmanager
def explain_os_errors(path: Path, expected: str = "it to be readable") -> Iterator[None]:
    """Turn the system's errors for a file, or a folder and its contents, into user errors."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise UserError(f"{place}: {error.strerror}; expected {expected}; check the path") from error


def decode_utf8(data: bytes, place: str) -> str:
    """Decode UTF-8, without a byte order mark; `place` starts the error."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start} is not UTF-8; expected plain text; unpack it, save it as UTF-8 or"
            " download it again"
        ) from error


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, which must not be empty."""
    content = decode_utf8(_read(path), str(path))
    if not content.strip():
        raise UserError(f"{path}: the file is empty; expected text; write or download it again")
    return content


def read_json(path: Path, kind: type[_T], expected: str) -> _T:
    """Read a JSON file as a msgspec type; `expected` ends errors: what was expected, and the cure.

    Raises:
        UserError: The file cannot be read, is not JSON, or has another layout.
    """
    return parse_json(_read(path), msgspec.json.Decoder(kind), str(path), expected)


def parse_json(data: bytes, decoder: msgspec.json.Decoder[_T], place: str, expected: str) -> _T:
    """Decode JSON; arguments and errors as in `read_json`."""
    try:
        return parsing.decode(data, decoder)
    except ValueError as error:
        raise UserError(f"{place}: {error}; {expected}") from error


def normalize_path(path: str, place: str) -> str:
    """Normalize an image path relative to the image folder; `place` starts errors."""
    plain = posixpath.normpath(path)
    if plain in (".", "..") or plain.startswith(("/", "../")) or "\0" in plain:
        raise UserError(
            f"{place}: image {path!r:.80}; expected a path below the folder of the images; write it so"
        )
    return plain


def strip_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Strip captions, and drop empty ones."""
    return tuple(caption for raw in captions if (caption := raw.strip()))


def make_record(
    image_id: int, split: str, captions: Iterable[str], images: Path, path: str, place: str
) -> Record:
    """Return the record of an image file, whose path may have folders; `place` starts errors."""
    folder, _, name = normalize_path(path, place).rpartition("/")
    return Record(image_id, split, strip_captions(captions), _join(images, folder), name)


def assign_split(splits: dict[str, str] | dict[int, str], key: Any, split: str, place: str) -> None:
    """Put an image of a split list into a split; `place` starts the error if it is in another one."""
    if (known := splits.setdefault(key, split)) != split:
        raise UserError(
            f"{place} is in the list of {known} too; expected it in one split, or training sees what is"
            " scored; delete it from one"
        )


def validate_records(
    records: Sequence[Record], images: Path, captions: Path | str, *, require_captions: bool = True
) -> list[Record]:
    """Check that there are records with captions and image files; return them in the order of shards.

    Args:
        records: Records of image files.
        images: Folder above all of them.
        captions: The caption files, for errors.
        require_captions: Check that each image has captions.
    """
    # One listing per folder: checking each of COCO's 118,287 files takes minutes on a cluster's file system.
    listings = {str(images): list_folder(images, "the folder of the images")}
    missing = []
    for record in records:
        if require_captions and not record.captions:
            raise UserError(
                f"{captions}: image {record.image_id} ({printable_name(record.name)}) has no captions, or"
                " only empty ones; expected at least one; add a caption or take the image out"
            )
        folder, _, name = record.file.rpartition("/")
        if folder not in listings:
            listings[folder] = set()
            # Images of a missing folder are reported by name.
            with suppress(UserError):
                listings[folder] = list_folder(Path(folder), "")
        if name not in listings[folder]:
            missing.append(record.file.removeprefix(f"{images}/"))
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
    """Return the names in a folder; `expected` describes it in the error."""
    with explain_os_errors(folder, expected), os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def name_some(names: Sequence[str]) -> str:
    """Return the number of names and the first three, in one line."""
    return errors.describe_images([*map(printable_name, names)])


def printable_name(name: str) -> str:
    """Return a name for a one-line error."""
    return name[:_LONGEST] if name.isprintable() else repr(name[:_LONGEST])


def _read(path: Path) -> bytes:
    with explain_os_errors(path):
        return read_file(path, _MAX_BYTES)


@cache
def _join(images: Path, folder: str) -> str:
    # All records of a folder share one string.
    return str(images / folder)


def _folder_with(folder: Path, path: str) -> str | None:
    """Return the folder one level below, or the parent, that holds a missing file."""
    with os.scandir(folder) as entries:
        near = sorted(entry.path for entry in entries if not entry.is_file(follow_symlinks=False))
    near.append(os.path.normpath(folder / ".."))
    # In an unreadable folder, os.path.isfile is False, while Path.is_file raises.
    return next((other for other in near if os.path.isfile(f"{other}/{path}")), None)  # noqa: PTH113
