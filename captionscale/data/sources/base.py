"""What the readers share: text, JSON and image files that are there, or an error that says what to fix."""

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

# Tells where to count image ids from, once the splits are known.
FirstImageId = Callable[[set[str]], int]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

# Of what an error shows of a file, in letters: damaged files have names of megabytes.
_LONGEST = 120
# COCO's and Karpathy's lists have 150 MB; others name millions of images.
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
    """Turn what the system says against a file, or a folder with all in it, into the error that says so.

    Raises:
        UserError: It cannot be opened or read.
    """
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise UserError(f"{place}: {error.strerror}; wanted it to be readable; check the path") from error


def decode_utf8(data: bytes, place: str) -> str:
    """Return UTF-8 as text, without the mark that some editors put before it.

    Raises:
        UserError: It is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start} is not UTF-8; wanted plain text; unpack it, save it as UTF-8 or"
            " download it again"
        ) from error


def read_text(path: Path) -> str:
    """Return a text file's content, which is not empty.

    Raises:
        UserError: It cannot be read, is not UTF-8, or is empty.
    """
    with explain_os_errors(path):
        content = decode_utf8(read_file(path, _MAX_BYTES), str(path))
    if not content.strip():
        raise UserError(f"{path}: the file is empty; wanted text; write or download it again")
    return content


def read_json(path: Path, kind: type[_T], wanted: str) -> _T:
    """Return a JSON file's content as a msgspec type.

    Args:
        path: The file.
        kind: The type, with the fields that are needed.
        wanted: The end of an error: what was wanted, and the cure.

    Raises:
        UserError: It cannot be read, is not JSON, or is of another layout.
    """
    with explain_os_errors(path):
        data = read_file(path, _MAX_BYTES)
    return parse_json(data, msgspec.json.Decoder(kind), str(path), wanted)


def parse_json(data: bytes, decoder: msgspec.json.Decoder[_T], place: str, wanted: str) -> _T:
    """Return JSON as the decoder's type; `wanted` and the errors are those of `read_json`."""
    try:
        return parsing.decode(data, decoder)
    except ValueError as error:
        raise UserError(f"{place}: {error}; {wanted}") from error


def normalize_path(path: str, place: str) -> str:
    """Return a path below the folder of the images in its one spelling.

    Args:
        path: As the data set has it.
        place: What an error says first.

    Raises:
        UserError: It leads out of the folder.
    """
    plain = posixpath.normpath(path)
    if plain in (".", "..") or plain.startswith(("/", "../")) or "\0" in plain:
        raise UserError(
            f"{place}: image {path!r:.80}; wanted a path below the folder of the images; write it so"
        )
    return plain


def strip_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Return captions without surrounding white space and without those that are empty."""
    return tuple(caption for raw in captions if (caption := raw.strip()))


def validate_records(
    records: Sequence[Record], images: Path, captions: Path | str, *, require_captions: bool = True
) -> list[Record]:
    """Return records in the order of shards, once all that they promise is proven to be there.

    Args:
        records: Of image files.
        images: The folder that holds all of them, directly or below.
        captions: The file that names them, or the words for several.
        require_captions: Whether each must have captions.

    Raises:
        UserError: There is no record, an image file is missing, or has no captions.
    """
    # One listing: to ask for each of COCO's 118,287 files takes minutes on a cluster's file system.
    there = {str(images): list_folder(images, "the folder of the images")}
    missing = []
    for record in records:
        if require_captions and not record.captions:
            raise UserError(
                f"{captions}: image {record.image_id} ({printable_name(record.name)}) has no captions, or"
                " only empty ones; wanted at least one; add a caption or take the image out"
            )
        folder, _, name = f"{record.source}/{record.name}".rpartition("/")
        if folder not in there:
            there[folder] = set()
            # The images of a folder that is not there are missing, each by its name.
            with suppress(UserError):
                there[folder] = list_folder(Path(folder), "")
        if name not in there[folder]:
            missing.append(f"{folder}/{name}".removeprefix(f"{images}/"))
    if not records:
        raise UserError(f"{captions}: no images; wanted at least one; give the file of a whole data set")
    if missing:
        cure = _folder_with(images, missing[0]) or "that holds them, or download them"
        raise UserError(
            f"{images}: {name_some(missing)} of {len(records)} missing; wanted each image of {captions};"
            f" give the folder {cure}"
        )
    return sort_records(records)


def list_folder(folder: Path, wanted: str) -> set[str]:
    """Return the names in a folder.

    Raises:
        UserError: It cannot be listed; `wanted` says what it should be.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; wanted {wanted}; check the path") from error


def name_some(names: Sequence[str]) -> str:
    """Return how many images these are, and the names of the first three, in one line."""
    return errors.describe_images([*map(printable_name, names)])


def printable_name(name: str) -> str:
    """Return a name as an error can show it in its one line."""
    return name[:_LONGEST] if name.isprintable() else repr(name[:_LONGEST])


def _folder_with(folder: Path, path: str) -> str | None:
    """Return the folder one level below, or the one above, that holds a file which this one lacks."""
    with os.scandir(folder) as entries:
        near = sorted(entry.path for entry in entries if not entry.is_file(follow_symlinks=False))
    near.append(os.path.normpath(folder / ".."))
    # os.path.isfile is False for a folder that may not be read, where Path.is_file raises.
    return next((other for other in near if os.path.isfile(f"{other}/{path}")), None)  # noqa: PTH113
