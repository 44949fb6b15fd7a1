"""Read tars that are there already: a WebDataset, such as img2dataset writes, or our own shards."""

import os
import re
import tarfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import xxhash

from captionscale import parsing
from captionscale.data.manifest import MANIFEST
from captionscale.data.packing import first_image_id
from captionscale.data.sources import base
from captionscale.data.sources.record import Record, sort_records
from captionscale.data.sources.source import Source
from captionscale.errors import UserError
from captionscale.files import open_file

# As webdataset groups: a key ends at the first dot of the base name, and names such as __meta__ are none.
_MEMBER = re.compile(r"(?P<key>(?:.*/|)[^.]+)\.(?P<ending>[^/]*)")
_META = re.compile(r"__[^/]*__(?:$|/)")
_UNPACKERS = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}
# A compressed one is refused: to pass it over would lose images without a word.
_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_WANTED_FACTS = "wanted a JSON object with caption or captions, and image_id or none; write the tar again"

_KINDS = {int: "a number in some .json", str: "a text in some .json", bytes: "missing in some samples"}

_Part = tuple[str, int, int]
_Identity = int | str | bytes


class _Facts(msgspec.Struct, gc=False):
    """What a sample's .json may say, whoever wrote it."""

    image_id: base.ImageId | str | None = None
    file: str | None = None
    caption: str | list[str] | msgspec.UnsetType | None = msgspec.UNSET
    captions: tuple[str, ...] = ()


class _Image(msgspec.Struct):
    tar: str
    name: str
    offset: int
    size: int
    texts: list[str]


class WebDataset(Source):
    """Tars of images with .txt or .json, as img2dataset writes them."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add --tars and --split."""
        parser.add_argument(
            "--tars", type=Path, nargs="+", required=True, metavar="PATH", help="tar files, or their folders"
        )
        base.add_split(parser)

    def read(self, options: Namespace) -> list[Record]:
        """Return the records of the module's function `read`."""
        return read(options.tars, options.split, partial(first_image_id, options.out))

    def files(self, options: Namespace) -> list[Path]:
        """Return the tars."""
        return find_tars(options.tars)


def read(tars: Sequence[Path], split: str, first_id: base.FirstImageId) -> list[Record]:
    """Read a WebDataset where it lies: the records point into its tars, nothing is unpacked.

    A sample is all members of one key: an image (jpg, jpeg, png, webp, bmp or gif) and its captions, the text
    of a `.txt` or `caption` or `captions` in a `.json`; what both say counts once. Samples are of one image,
    and joined in their order, if their `.json` has the same `image_id`, or, where no `.json` has one, if
    their image bytes are the same.

    Args:
        tars: Tars, or folders that hold them; those of a folder are taken in the order of their names.
        split: The split that all images get.
        first_id: Returns the first image id of the split, where no `.json` has a number as
            `image_id`; ids are counted in the order in which images appear.

    Returns:
        The records by image id. Samples without an image are left out: img2dataset writes one for each
        failed download. So are images whose captions are there, but empty; unless all are, for then there
        are no captions, and the images can be captioned only.

    Raises:
        UserError: If a tar is missing, compressed, damaged or cut short, a sample has two images or a broken
            text, an image has no captions although others have, or only some samples have an `image_id`.

    Source:
        The WebDataset format, https://github.com/webdataset/webdataset; img2dataset's output,
        https://github.com/rom1504/img2dataset.
    """
    found: dict[_Identity, _Image] = {}
    for path in find_tars(tars):
        samples = _samples(path)
        with base.explain_os_errors(path), open_file(path) as file:
            for parts in samples:
                name, offset, size = parts["image"]
                facts = _facts(path, file.fileno(), parts)
                identity: _Identity
                if facts.image_id is None:
                    identity = xxhash.xxh3_128_digest(os.pread(file.fileno(), size, offset))
                else:
                    identity = facts.image_id
                image = _Image(str(path), _utf8(facts.file or name), offset, size, [])
                found.setdefault(identity, image).texts.extend(_texts(path, file.fileno(), parts, facts))
    place = ", ".join(map(str, tars))
    if not found:
        raise UserError(
            f"{place}: no images; wanted members such as 000000001.jpg; give the tars of a data set"
        )
    if len(kinds := {type(identity) for identity in found}) > 1:
        raise UserError(
            f"{place}: image_id is {' or '.join(sorted(_KINDS[kind] for kind in kinds))}; wanted a number"
            " in each .json, a text in each, or none; write the tars again"
        )
    first = first_id({split})
    records: list[Record] = []
    captions = {identity: base.strip_captions(image.texts) for identity, image in found.items()}
    captioned = any(captions.values())
    for identity, image in found.items():
        if captioned and not captions[identity]:
            if image.texts:
                continue
            raise UserError(
                f"{image.tar}: {base.printable_name(image.name)} has no captions, others have; wanted a .txt,"
                " or a .json with caption, beside each image or none; write the tar again"
            )
        image_id = identity if isinstance(identity, int) else first + len(records)
        records.append(
            Record(image_id, split, captions[identity], image.tar, image.name, image.offset, image.size)
        )
    return sort_records(records)


def find_tars(tars: Sequence[Path]) -> list[Path]:
    """Return the tars that are meant: those given, and those in the folders given.

    Raises:
        UserError: A folder cannot be read, has no tars, or has our own shards of several splits.
    """
    found = []
    for path in tars:
        if not path.is_dir():
            found.append(path)
            continue
        names = base.list_folder(path, "a tar or a folder of tars")
        chosen = sorted(name for name in names if name.endswith(_ENDINGS) and not name.startswith("."))
        if not chosen:
            raise UserError(f"{path}: no tars; wanted files .tar; check the path")
        splits = sorted({name.rpartition("-")[0] for name in chosen})
        if MANIFEST in names and len(splits) > 1:
            raise UserError(
                f"{path}: shards of the splits {', '.join(splits)}; wanted one split, or training sees what"
                f" is scored; give the tars of one, as in {path}/{splits[0]}-*.tar"
            )
        found += [path / name for name in chosen]
    # Not `resolve`, whose error for links in a circle is not the system's.
    return list(dict.fromkeys(Path(os.path.realpath(path)) for path in found))


def _samples(path: Path) -> list[dict[str, _Part]]:
    """Return the parts of each sample that has an image: name, offset and size of image, txt and json."""
    samples: dict[str, dict[str, _Part]] = {}
    for member in iter_members(path):
        if member.issparse():
            raise UserError(
                f"{path}: {base.printable_name(member.name)} is sparse; wanted whole members, to read"
                " by offset; write the tar again without --sparse"
            )
        found = _MEMBER.fullmatch(member.name) if member.isreg() else None
        if not found or _META.match(member.name):
            continue
        ending = found["ending"].lower()
        part = "image" if ending in base.IMAGE_EXTENSIONS else ending
        if part in ("image", "txt", "json"):
            parts = samples.setdefault(found["key"], {})
            if part in parts:
                both = f"{base.printable_name(parts[part][0])} and {base.printable_name(member.name)}"
                raise UserError(
                    f"{path}: {both} are of one sample; wanted one {part} in each; write the tar again"
                )
            parts[part] = member.name, member.offset_data, member.size
    return [parts for parts in samples.values() if "image" in parts]


def iter_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, all of which lie within it.

    Raises:
        UserError: It cannot be read, or is compressed, damaged or cut short.
    """
    with base.explain_os_errors(path), open_file(path) as file:
        if unpacker := _UNPACKERS.get(file.read(2)):
            raise UserError(
                f"{path}: compressed; wanted a plain tar, to read by offset; unpack it with {unpacker}"
            )
        file.seek(0)
        total = os.fstat(file.fileno()).st_size
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    if tar.offset <= member.offset:
                        raise tarfile.ReadError("a size below zero")
                    end = tar.offset
                    # It keeps all members, and a tar may have millions.
                    tar.members.clear()  # type: ignore[attr-defined]
                    yield member
            # tarfile stops without a word at a header that is damaged or cut; a whole tar ends with zeros.
            whole = os.pread(file.fileno(), tarfile.BLOCKSIZE, end) == bytes(tarfile.BLOCKSIZE)
        # Of a long name it believes the size, and reads names of names without end.
        except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError):
            whole = False
        if not whole:
            raise UserError(
                f"{path}: damaged or cut short at byte {min(end, total):,} of {total:,}; wanted a whole tar;"
                " download or write it again"
            )


def _facts(path: Path, descriptor: int, parts: dict[str, _Part]) -> _Facts:
    if "json" not in parts:
        return _Facts()
    name, offset, size = parts["json"]
    place = f"{path}: {base.printable_name(name)}"
    try:
        # Not msgspec's reader: img2dataset writes NaN.
        return msgspec.convert(parsing.loads(os.pread(descriptor, size, offset)), _Facts)
    except msgspec.ValidationError as error:
        raise UserError(f"{place}: {parsing.describe_error(error)}; {_WANTED_FACTS}") from error
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {error}; {_WANTED_FACTS}") from error


def _texts(path: Path, descriptor: int, parts: dict[str, _Part], facts: _Facts) -> list[str]:
    """Return a sample's captions; empty ones too, for they tell that there should be some."""
    texts = [*facts.captions]
    if isinstance(facts.caption, list):
        texts += facts.caption
    elif facts.caption is not msgspec.UNSET:
        texts.append(facts.caption or "")
    if "txt" in parts:
        name, offset, size = parts["txt"]
        text = base.decode_utf8(
            os.pread(descriptor, size, offset), f"{path}: {base.printable_name(name)}"
        ).strip()
        if text not in map(str.strip, texts):
            texts.append(text)
    return [_utf8(text) for text in texts]


def _utf8(text: str) -> str:
    """Return text that can be written: half a character, as JSON and tars may hold, becomes a '?'."""
    return text.encode(errors="replace").decode()
