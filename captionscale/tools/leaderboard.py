"""Write the files that leaderboards take, verified complete against the official list of images."""

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from captionscale.data.sources import base
from captionscale.errors import UserError, describe_images, did_you_mean
from captionscale.files import atomic_write
from captionscale.score.results import Result, read_results, write_results
from captionscale.score.tokenizer import INVISIBLE

# Underscores delimit the parts of a file name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


@dataclass(frozen=True)
class Leaderboard:
    """A set of images that a leaderboard scores."""

    images: int
    """How many there are."""
    file: str
    """Name of the results file; `{name}` is the algorithm's."""
    image_list: str
    """The file that lists the images, and its source."""
    archive: str = ""
    """The uploaded archive of results files; empty: the file itself is uploaded."""
    archived_with: str = ""
    """The other set whose file must be in the archive too."""


def _coco(split: str, images: int, image_list: str, archived: str, **archive: str) -> Leaderboard:
    source = f"{image_list}, in http://images.cocodataset.org/annotations/{archived}"
    return Leaderboard(images, f"captions_{split}_{{name}}_results.json", source, **archive)


def _nocaps(split: str, images: int) -> Leaderboard:
    image_list = f"nocaps_{split}_image_info.json"
    source = f"{image_list}, from https://s3.amazonaws.com/nocaps/{image_list}"
    return Leaderboard(images, f"nocaps_{split}_{{name}}_results.json", source)


# fmt: off
LEADERBOARDS = {
    "coco2014-val": _coco(
        "val2014", 40_504, "captions_val2014.json", "annotations_trainval2014.zip",
        archive="results.zip", archived_with="coco2014-test",
    ),
    "coco2014-test": _coco(
        "test2014", 40_775, "image_info_test2014.json", "image_info_test2014.zip",
        archive="results.zip", archived_with="coco2014-val",
    ),
    "coco2017-test": _coco(
        "test2017", 40_670, "image_info_test2017.json", "image_info_test2017.zip",
        archive="captions_test2017_{name}_results.zip",
    ),
    "nocaps-val": _nocaps("val", 4_500),
    "nocaps-test": _nocaps("test", 10_600),
}
# fmt: on
"""The sets, by their names on the command line.

Source:
    COCO: https://cocodataset.org/#captions-upload and #download; nocaps: https://nocaps.org/download and
    https://eval.ai/web/challenges/challenge-page/355.
"""


@dataclass(frozen=True)
class Submission:
    """The files written."""

    file: Path
    """The results of one set."""
    captions: int
    empty: int
    """How many of the captions are empty."""
    upload: Path | None
    """The file to upload; None until there are results of `missing_set`."""
    missing_set: str = ""


class _Image(msgspec.Struct, gc=False):
    id: base.ImageId


class _Document(msgspec.Struct, gc=False):
    images: list[_Image]


def write_submission(
    board_name: str, captions: Sequence[Path], images: Path | None, name: str, out: Path
) -> Submission:
    """Write the results of a set under their official name, and the archive once its files are complete.

    The same captions give the same bytes.

    Args:
        board_name: One of `LEADERBOARDS`.
        captions: COCO results, in one file or in parts.
        images: The official list of the set's images.
        name: Of the algorithm.
        out: The folder for this algorithm's files.

    Raises:
        UserError: An unknown set, no official list or that of another set, captions that are missing, surplus
            or repeated, an unusable name, files of another algorithm in the folder, or an unwritable folder.
    """
    if board_name not in LEADERBOARDS:
        raise UserError(
            f"--eval-set {board_name}: no such set of images; {did_you_mean(board_name, LEADERBOARDS)}"
        )
    board = LEADERBOARDS[board_name]
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r:.60}: is delimited by underscores in a file name, expected letters a to z,"
            " digits, '.' and '-', such as captionscale-attention; choose another name"
        )
    expected = _official_ids(board_name, images)
    found = _merged(captions)
    faults = {"missing": expected - found.keys(), "of no image in the list": found.keys() - expected}
    if any(faults.values()):
        described = [f"{describe_images(sorted(ids))} {fault}" for fault, ids in faults.items() if ids]
        raise UserError(
            f"{', '.join(map(str, captions))}: {len(found):,} captions, {', '.join(described)}; expected one"
            f" for each of the {len(expected):,} images of {images}; caption that set with captionscale"
            " caption RUN --split"
        )
    results: list[Result] = [
        {"image_id": image_id, "caption": INVISIBLE.sub(" ", found[image_id]).strip()}
        for image_id in sorted(found)
    ]
    _check_one_algorithm(out, name)
    file = out / board.file.format(name=name)
    write_results(results, file)
    files, missing = [file], ""
    if board.archived_with:
        other = out / LEADERBOARDS[board.archived_with].file.format(name=name)
        if other.exists():
            files.append(_complete(other, board.archived_with))
        else:
            missing = board.archived_with
    upload = None if missing else file
    if board.archive and upload:
        upload = out / board.archive.format(name=name)
        _zip(files, upload)
    empty = sum(not result["caption"] for result in results)
    return Submission(file, len(results), empty, upload, missing)


def _official_ids(board_name: str, images: Path | None) -> set[int]:
    """Return the ids of a set's images."""
    board = LEADERBOARDS[board_name]
    cure = f"give {board.image_list}"
    if images is None:
        raise UserError(
            f"leaderboard: no --image-info, expected the official list of {board_name}, to verify that no"
            f" image is missing; {cure}"
        )
    document = base.read_json(images, _Document, f"expected the official list of {board_name}; {cure}")
    ids = {image.id for image in document.images}
    if len(ids) != board.images:
        others = [name for name, other in LEADERBOARDS.items() if other.images == len(ids)]
        guess = f" (as many as {others[0]} has)" if others else ""
        raise UserError(
            f"{images}: lists {len(ids):,} images{guess}, expected the {board.images:,} of"
            f" {board_name}; {cure}"
        )
    return ids


def _merged(files: Sequence[Path]) -> dict[int, str]:
    """Return the captions of all parts."""
    merged: dict[int, str] = {}
    for file in files:
        part = read_results(file)
        if both := part.keys() & merged.keys():
            raise UserError(
                f"{file}: {describe_images(sorted(both))} captioned in another part too; expected one caption"
                " for each image; give each part once"
            )
        merged |= part
    return merged


def _check_one_algorithm(out: Path, name: str) -> None:
    """Refuse a folder with files of another algorithm."""
    patterns = [board.file.partition("{name}") for board in LEADERBOARDS.values()]
    for path in sorted(out.glob("*")) if out.is_dir() else []:
        for start, _, end in patterns:
            other = path.name.removeprefix(start).removesuffix(end)
            if path.name == f"{start}{other}{end}" and other != name:
                raise UserError(
                    f"{out}: has {path.name}, of the algorithm {other!r}; expected only files of {name!r};"
                    " take another --out for each algorithm"
                )


def _complete(file: Path, board_name: str) -> Path:
    count, expected = len(read_results(file)), LEADERBOARDS[board_name].images
    if count != expected:
        raise UserError(
            f"{file}: {count:,} captions, expected {expected:,}; write it again with --eval-set {board_name}"
        )
    return file


def _zip(files: Sequence[Path], archive: Path) -> None:
    with atomic_write(archive) as stream, zipfile.ZipFile(stream, "w") as packed:
        for file in sorted(files):
            # At the top, where the server looks; ZipInfo has a fixed time, so the bytes are reproducible.
            entry = zipfile.ZipInfo(file.name)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            entry.create_system = 3
            packed.writestr(entry, file.read_bytes())
