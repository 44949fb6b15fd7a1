"""The manifest of packed shards, `manifest.json`: written last, read first."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import MB, read_file

FORMAT = 2
# 100,000 shards of 150 bytes; parsing takes at most 20 times as much memory.
MAX_MANIFEST_BYTES = 16 * MB
# 22 million images.
MAX_INDEX_BYTES = 2000 * MB
MAX_REJECTED_BYTES = 512 * MB
MANIFEST = "manifest.json"
# Splits name files.
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
CURE = "copy it again from an intact source, or remove the folder and pack again"

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**50)]
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**50)]
_Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:05d}.tar"


def index_name(split: str) -> str:
    """Return the file name of a split's index."""
    return f"{split}.index.npy"


class Images(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How images are stored: original, or larger ones resized to a shorter side, as JPEGs of a quality."""

    short_side: _Positive | None = None
    quality: _Positive | None = None

    def __str__(self) -> str:
        if self.short_side is None:
            return "original"
        return f"--resize {self.short_side} --quality {self.quality}"


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tar."""

    name: str
    size_bytes: _Positive
    blake3: _Hash
    images: _Count


class SplitInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One split.

    Attributes:
        rejected: Number of unreadable images, listed in `rejected.jsonl`.
        tool: Versions of captionscale and of the libraries that resized images.
        sources: SHA-256 of each caption file, list or tar of the data set.
        fingerprint: Hash of the records and options.
    """

    images: _Count
    captions: _Count
    rejected: _Count
    tool: str
    sources: dict[str, str]
    fingerprint: str
    index_sha256: _Hash
    shards: tuple[Shard, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All splits of a folder; images are stored in the same way in all of them."""

    format: int
    images: Images
    splits: dict[str, SplitInfo]

    def dumps(self) -> bytes:
        """Return the file's content."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def read(folder: Path) -> Manifest:
    """Return the manifest of a folder of shards.

    Raises:
        UserError: No manifest, a damaged one, or one of another format.
    """
    return fetch(lambda name: read_file(folder / name, MAX_MANIFEST_BYTES), str(folder))


def fetch(file: Callable[[str], bytes], place: str) -> Manifest:
    """Return the manifest of local or remote shards; `file` reads a small file of the folder `place`."""
    path = f"{place}/{MANIFEST}"
    try:
        document = parsing.loads(file(MANIFEST))
        found = document["format"]
        if found == FORMAT:
            return _manifest(document)
    except FileNotFoundError:
        raise UserError(
            f"{place}: no {MANIFEST}, so no finished shards; run captionscale pack first, or correct"
            " the path (a relative one starts at the folder you are in)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else getattr(error, "strerror", error)
        raise UserError(f"{path}: not a manifest ({reason}); {CURE}") from None
    newer = isinstance(found, int) and found > FORMAT
    cure = "upgrade captionscale" if newer else "pack again, into another folder"
    raise UserError(f"{path}: format {found}, expected {FORMAT}; {cure}")


def _manifest(document: dict[str, Any]) -> Manifest:
    for split, facts in document["splits"].items():
        if not SPLIT_NAME.fullmatch(split):
            raise ValueError(f"split {split!r:.60} cannot name files")
        for number, shard in enumerate(facts["shards"]):
            name = shard_name(split, number)
            try:
                found = parsing.convert(shard, Shard).name
            except ValueError as error:
                # Name the file instead of its number.
                raise ValueError(f"shard {name}: {error}") from None
            if found != name:
                raise ValueError(f"shard {name} is called {found!r:.60}")
    return parsing.convert(document, Manifest)
