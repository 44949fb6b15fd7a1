"""Write the files that leaderboards take, proven complete against the official list of images."""

import json
import re
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from captionscale.data.sources import base
from captionscale.errors import UserError, describe_images, did_you_mean
from captionscale.files import atomic_write
from captionscale.score.results import read_results
from captionscale.score.tokenizer import INVISIBLE

# The parts of a file's name are parted by underscores.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


@dataclass(frozen=True)
class Leaderboard:
    """A set of images that a leaderboard scores.

    Attributes:
        file: Name of the results file; `{name}` is the algorithm's.
        images: How many there are.
        image_list: The file that lists them, and where it is from.
        archive: What the results files are uploaded in; empty: the file itself is uploaded.
        archived_with: The other set whose file must be in the archive too.
    """

    file: str
    images: int
    image_list: str
    archive: str = ""
    archived_with: str = ""


LEADERBOARDS = {
    "coco2014-val": Leaderboard(
        file="captions_val2014_{name}_results.json",
        images=40_504,
        image_list="captions_val2014.json, in http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        archive="results.zip",
        archived_with="coco2014-test",
    ),
    "coco2014-test": Leaderboard(
        file="captions_test2014_{name}_results.json",
        images=40_775,
        image_list="image_info_test2014.json, in http://images.cocodataset.org/annotations/image_info_test2014.zip",
        archive="results.zip",
        archived_with="coco2014-val",
    ),
    "coco2017-test": Leaderboard(
        file="captions_test2017_{name}_results.json",
        images=40_670,
        image_list="image_info_test2017.json, in http://images.cocodataset.org/annotations/image_info_test2017.zip",
        archive="captions_test2017_{name}_results.zip",
    ),
    "nocaps-val": Leaderboard(
        file="nocaps_val_{name}_results.json",
        images=4_500,
        image_list="nocaps_val_image_info.json, from https://s3.amazonaws.com/nocaps/nocaps_val_image_info.json",
    ),
    "nocaps-test": Leaderboard(
        file="nocaps_test_{name}_results.json",
        images=10_600,
        image_list="nocaps_test_image_info.json, from https://s3.amazonaws.com/nocaps/nocaps_test_image_info.json",
    ),
}
"""The sets, by the name that the command line has for them.

Source:
    COCO: https://cocodataset.org/#captions-upload and #download; nocaps: https://nocaps.org/download and
    https://eval.ai/web/challenges/challenge-page/355.
"""


@dataclass(frozen=True)
class Submission:
    """What was written.

    Attributes:
        file: The results of one set.
        captions: How many are in it.
        empty: How many of them have no letter.
        upload: What to upload; none: it waits for the results of `missing_set`.
        missing_set: The set whose results are not there yet.
    """

    file: Path
    captions: int
    empty: int
    upload: Path | None
    missing_set: str = ""


class _Image(msgspec.Struct, gc=False):
    id: base.ImageId


class _Document(msgspec.Struct, gc=False):
    images: list[_Image]


def write_submission(
    board_name: str, captions: Sequence[Path], images: Path | None, name: str, out: Path
) -> Submission:
    """Write the results of a set under their official name, and the archive once all that it holds is there.

    The same captions make the same bytes.

    Args:
        board_name: One of `LEADERBOARDS`.
        captions: COCO results, in one file or in parts.
        images: The official list of the set's images.
        name: Of the algorithm.
        out: The folder for one algorithm's files.

    Raises:
        UserError: An unknown set, no official list or another one, captions that are missing, surplus or
            doubled, a name that would break the file's, files of another algorithm in the folder, or a folder
            that cannot be written.
    """
    if board_name not in LEADERBOARDS:
        raise UserError(
            f"--eval-set {board_name}: no such set of images; {did_you_mean(board_name, LEADERBOARDS)}"
        )
    board = LEADERBOARDS[board_name]
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r:.60}: stands in a file's name between two underscores; wanted English letters,"
            " digits, '.' and '-', such as captionscale-attention; choose such a name"
        )
    wanted = _official(board_name, images)
    found = _merged(captions)
    _prove_complete(captions, found, wanted, images)
    texts = {image_id: INVISIBLE.sub(" ", found[image_id]).strip() for image_id in sorted(found)}
    _prove_one_algorithm(out, name)
    out.mkdir(parents=True, exist_ok=True)
    file = out / board.file.format(name=name)
    with atomic_write(file) as stream:
        stream.write(_results(texts))
    empty = sum(not text for text in texts.values())
    if not board.archive:
        return Submission(file, len(texts), empty, upload=file)
    files = [file]
    if board.archived_with:
        other = out / LEADERBOARDS[board.archived_with].file.format(name=name)
        if not other.exists():
            return Submission(file, len(texts), empty, upload=None, missing_set=board.archived_with)
        _prove_whole(other, board.archived_with)
        files.append(other)
    archive = out / board.archive.format(name=name)
    _zip(files, archive)
    return Submission(file, len(texts), empty, upload=archive)


def _official(board_name: str, images: Path | None) -> set[int]:
    """Return the ids of a set's images."""
    board = LEADERBOARDS[board_name]
    cure = f"give {board.image_list}"
    if images is None:
        raise UserError(
            f"leaderboard: no --image-info; wanted the official list of {board_name}, to prove that no image is"
            f" missing; {cure}"
        )
    document = base.read_json(images, _Document, f"wanted the official list of {board_name}; {cure}")
    ids = {image.id for image in document.images}
    if len(ids) != board.images:
        others = [name for name, other in LEADERBOARDS.items() if other.images == len(ids)]
        guess = f" (as many as {others[0]} has)" if others else ""
        raise UserError(
            f"{images}: lists {len(ids):,} images{guess}, wanted the {board.images:,} of {board_name}; {cure}"
        )
    return ids


def _merged(files: Sequence[Path]) -> dict[int, str]:
    """Return the captions of all parts."""
    merged: dict[int, str] = {}
    for file in files:
        part = read_results(file)
        if both := part.keys() & merged.keys():
            raise UserError(
                f"{file}: {describe_images(sorted(both))} captioned in another part too; wanted one caption for each"
                " image; give each part once"
            )
        merged |= part
    return merged


def _prove_complete(
    captions: Sequence[Path], found: Collection[int], wanted: set[int], images: Path | None
) -> None:
    faults = {"missing": wanted - set(found), "of no image in the list": set(found) - wanted}
    told = ", ".join(f"{describe_images(sorted(ids))} {fault}" for fault, ids in faults.items() if ids)
    if told:
        raise UserError(
            f"{', '.join(map(str, captions))}: {len(found):,} captions, {told}; wanted one for each of the"
            f" {len(wanted):,} images of {images}; caption that set with captionscale caption RUN --split"
        )


def _prove_one_algorithm(out: Path, name: str) -> None:
    """Refuse a folder in which an archive could be of another algorithm than the file beside it."""
    patterns = [board.file.partition("{name}") for board in LEADERBOARDS.values()]
    for path in sorted(out.glob("*")) if out.is_dir() else []:
        for start, _, end in patterns:
            other = path.name.removeprefix(start).removesuffix(end)
            if path.name == f"{start}{other}{end}" and other != name:
                raise UserError(
                    f"{out}: has {path.name}, of the algorithm {other!r}; wanted only files of {name!r};"
                    " take another --out for each algorithm"
                )


def _prove_whole(file: Path, board_name: str) -> None:
    count, wanted = len(read_results(file)), LEADERBOARDS[board_name].images
    if count != wanted:
        raise UserError(
            f"{file}: {count:,} captions, wanted {wanted:,}; write it again with --eval-set {board_name}"
        )


def _results(texts: dict[int, str]) -> bytes:
    lines = [{"image_id": image_id, "caption": text} for image_id, text in texts.items()]
    return json.dumps(lines, ensure_ascii=False).encode()


def _zip(files: Sequence[Path], archive: Path) -> None:
    with atomic_write(archive) as stream, zipfile.ZipFile(stream, "w") as packed:
        for file in sorted(files):
            # At the top, where the server looks; with one fixed time, so that the same captions make the same
            # bytes.
            entry = zipfile.ZipInfo(file.name)
            entry.compress_type, entry.external_attr, entry.create_system = (
                zipfile.ZIP_DEFLATED,
                0o644 << 16,
                3,
            )
            packed.writestr(entry, file.read_bytes())
