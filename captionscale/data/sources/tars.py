"""Read existing tars: a WebDataset, such as from img2dataset, or captionscale's own shards."""

import os
import re
import tarfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
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

# As in webdataset, a key ends at the first dot of the base name, and names such as __meta__ are skipped.
_MEMBER = re.compile(r"(?P<key>(?:.*/|)[^.]+)\.(?P<ending>[^/]*)")
_META = re.compile(r"__[^/]*__(?:$|/)")
_UNPACKERS = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}
# Compressed tars are refused, not skipped silently.
_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_EXPECTED_JSON = "expected a JSON object with caption or captions, and image_id or none; write the tar again"

_KINDS = {int: "a number in some .json", str: "a text in some .json", bytes: "missing in some samples"}

# Name, offset and size of a member.
_Part = tuple[str, int, int]
_Identity = int | str | bytes


class _Json(msgspec.Struct, gc=False):
    """The fields of a sample's .json that are read."""

    image_id: base.ImageId | str | None = None
    file: str | None = None
    caption: str | list[str] | msgspec.UnsetType | None = msgspec.UNSET
    captions: tuple[str, ...] = ()


class WebDataset(Source):
    """Tars of images with .txt or .json, as img2dataset writes them."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add --tars and --split."""
        parser.add_argument(
            "--tars", type=Path, nargs="+", required=True, metavar="PATH", help="tar files, or their folders"
        )
        base.add_options(parser, "split")

    def read(self, options: Namespace) -> list[Record]:
        """Return the records of the module's function `read`."""
        return read(options.tars, options.split, partial(first_image_id, options.out))

    def files(self, options: Namespace) -> list[Path]:
        """Return the tars."""
        return find_tars(options.tars)


def read(tars: Sequence[Path], split: str, first_id: base.FirstImageId) -> list[Record]:
    """Read a WebDataset without unpacking: records point into its tars.

    A sample is all members of one key: an image (jpg, jpeg, png, webp, bmp or gif) and its captions, from a
    `.txt` or from `caption` or `captions` in a `.json`, without repetition. Samples with the same `image_id`
    or, where no `.json` has one, with the same image bytes are joined in order.

    Tars in a folder are read in the order of their names. If no `.json` has an integer `image_id`, ids are
    counted from `first_id`. Samples without an image are skipped: img2dataset writes one for each failed
    download. Images with empty captions are skipped too, unless all captions are empty.

    Source:
        The WebDataset format, https://github.com/webdataset/webdataset; img2dataset's output,
        https://github.com/rom1504/img2dataset.
    """
    # The first of a joined image's samples, and all captions.
    found: dict[_Identity, tuple[Record, list[str]]] = {}
    for path in find_tars(tars):
        samples = _samples(path)
        with base.explain_os_errors(path), open_file(path) as file:
            for parts in samples:
                name, offset, size = parts["image"]
                fields, texts = _read_texts(path, file.fileno(), parts)
                identity: _Identity | None = fields.image_id
                if identity is None:
                    identity = xxhash.xxh3_128_digest(os.pread(file.fileno(), size, offset))
                record = Record(0, split, (), str(path), _utf8(fields.file or name), offset, size)
                found.setdefault(identity, (record, []))[1].extend(texts)
    place = ", ".join(map(str, tars))
    if not found:
        raise UserError(
            f"{place}: no images; expected members such as 000000001.jpg; give the tars of a data set"
        )
    if len(kinds := {type(identity) for identity in found}) > 1:
        raise UserError(
            f"{place}: image_id is {' or '.join(sorted(_KINDS[kind] for kind in kinds))}; expected a number"
            " in each .json, a text in each, or none; write the tars again"
        )
    first = first_id({split})
    records: list[Record] = []
    captioned = any(base.strip_captions(texts) for _, texts in found.values())
    for identity, (record, texts) in found.items():
        captions = base.strip_captions(texts)
        if captioned and not captions:
            if texts:
                continue
            raise UserError(
                f"{record.source}: {base.printable_name(record.name)} has no captions, others have; expected"
                " a .txt, or a .json with caption, with each image or none; write the tar again"
            )
        image_id = identity if isinstance(identity, int) else first + len(records)
        records.append(replace(record, image_id=image_id, captions=captions))
    return sort_records(records)


def find_tars(tars: Sequence[Path]) -> list[Path]:
    """Return the given tars, and those in the given folders."""
    found = []
    for path in tars:
        if not path.is_dir():
            found.append(path)
            continue
        names = base.list_folder(path, "a tar or a folder of tars")
        chosen = sorted(name for name in names if name.endswith(_ENDINGS) and not name.startswith("."))
        if not chosen:
            raise UserError(f"{path}: no tars; expected files .tar; check the path")
        splits = sorted({name.rpartition("-")[0] for name in chosen})
        if MANIFEST in names and len(splits) > 1:
            raise UserError(
                f"{path}: shards of the splits {', '.join(splits)}; expected one split, or training sees what"
                f" is scored; give the tars of one, as in {path}/{splits[0]}-*.tar"
            )
        found += [path / name for name in chosen]
    # Not `resolve`, whose error for links in a circle is not the system's.
    return list(dict.fromkeys(Path(os.path.realpath(path)) for path in found))


def _samples(path: Path) -> list[dict[str, _Part]]:
    """Return name, offset and size of image, txt and json of each sample with an image."""
    samples: dict[str, dict[str, _Part]] = {}
    for member in iter_members(path):
        if member.issparse():
            raise UserError(
                f"{path}: {base.printable_name(member.name)} is sparse; expected whole members, to read"
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
                    f"{path}: {both} are of one sample; expected one {part} in each; write the tar again"
                )
            parts[part] = member.name, member.offset_data, member.size
    return [parts for parts in samples.values() if "image" in parts]


def iter_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an intact tar; refuse one that is compressed, damaged or cut short."""
    with base.explain_os_errors(path), open_file(path) as file:
        if unpacker := _UNPACKERS.get(file.read(2)):
            raise UserError(
                f"{path}: compressed; expected a plain tar, to read by offset; unpack it with {unpacker}"
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
                    # tarfile keeps all members, and there may be millions.
                    tar.members.clear()  # type: ignore[attr-defined]
                    yield member
            # tarfile stops silently at a damaged header; an intact tar ends with zeros.
            whole = os.pread(file.fileno(), tarfile.BLOCKSIZE, end) == bytes(tarfile.BLOCKSIZE)
        # tarfile trusts the size of long names, and follows names of names without end.
        except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError):
            whole = False
        if not whole:
            raise UserError(
                f"{path}: damaged or cut short at byte {min(end, total):,} of {total:,}; expected a whole"
                " tar; download or write it again"
            )


def _read_texts(path: Path, descriptor: int, parts: dict[str, _Part]) -> tuple[_Json, list[str]]:
    """Return the .json of a sample, and its captions, including empty ones."""

    def read(part: str) -> tuple[bytes, str]:
        name, offset, size = parts[part]
        return os.pread(descriptor, size, offset), f"{path}: {base.printable_name(name)}"

    fields = _parse_json(*read("json")) if "json" in parts else _Json()
    texts = [*fields.captions]
    if isinstance(fields.caption, list):
        texts += fields.caption
    elif fields.caption is not msgspec.UNSET:
        texts.append(fields.caption or "")
    if "txt" in parts:
        text = base.decode_utf8(*read("txt")).strip()
        if text not in map(str.strip, texts):
            texts.append(text)
    return fields, [_utf8(text) for text in texts]


def _parse_json(data: bytes, place: str) -> _Json:
    try:
        # Not msgspec's parser: img2dataset writes NaN.
        return msgspec.convert(parsing.loads(data), _Json)
    except msgspec.ValidationError as error:
        fault = parsing.describe_error(error)
    except ValueError as error:
        fault = f"not JSON: {error}"
    raise UserError(f"{place}: {fault}; {_EXPECTED_JSON}")


def _utf8(text: str) -> str:
    """Replace lone surrogates, which JSON and tars may hold, by '?'."""
    return text.encode(errors="replace").decode()
