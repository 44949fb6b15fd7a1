import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from captionscale.cli import main
from captionscale.errors import UserError
from captionscale.tools.leaderboard import LEADERBOARDS, write_submission

SET = "nocaps-val"


def listed(folder: Path, board: str) -> Path:
    """An official list of a set, its ids three apart."""
    path = folder / f"{board}.json"
    ids = range(0, 3 * LEADERBOARDS[board].images, 3)
    path.write_text(
        json.dumps({"info": {}, "images": [{"id": number, "file_name": "x.jpg"} for number in ids]})
    )
    return path


def results(path: Path, captions: Iterable[tuple[int, str]]) -> Path:
    path.write_text(json.dumps([{"image_id": number, "caption": text} for number, text in captions]))
    return path


def whole(folder: Path, board: str) -> Path:
    """Captions of a set, in falling order of their ids."""
    ids = range(3 * LEADERBOARDS[board].images - 3, -1, -3)
    return results(folder / f"{board}-captions.json", ((number, f"a dog {number}") for number in ids))


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        write_submission(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_sets_of_coco_2014_are_in_one_archive_under_their_official_names(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    for board in ("coco2014-val", "coco2014-test"):
        captions, images = whole(tmp_path, board), listed(tmp_path, board)
        words = (
            "--eval-set",
            board,
            "--captions",
            captions,
            "--image-info",
            images,
            "--name",
            "alg-1.0",
            "--out",
            out,
        )
        main(["leaderboard", *map(str, words)])
    text = capsys.readouterr().out.splitlines()
    assert text[0].endswith(
        "captions_val2014_alg-1.0_results.json: 40,504 captions, one for each image of coco2014-val"
    )
    assert text[1] == "not to upload yet: its archive needs coco2014-test too, by --eval-set coco2014-test"
    assert text[3] == f"upload {out / 'results.zip'}"
    with zipfile.ZipFile(out / "results.zip") as packed:
        assert packed.testzip() is None
        assert packed.namelist() == [
            "captions_test2014_alg-1.0_results.json",
            "captions_val2014_alg-1.0_results.json",
        ]
        for name in packed.namelist():
            assert packed.read(name) == (out / name).read_bytes()
    # The server's own reader accepts them.
    official = COCO(str(tmp_path / "coco2014-test.json"))
    taken = official.loadRes(str(out / "captions_test2014_alg-1.0_results.json"))
    assert taken.getImgIds() == official.getImgIds()
    assert len(taken.anns) == 40_775

    # The same captions make the same bytes, on another day and in parts.
    first = (out / "results.zip").read_bytes()
    lines = json.loads((tmp_path / "coco2014-val-captions.json").read_text())
    parts = [tmp_path / "one.json", tmp_path / "two.json"]
    for part, cut in zip(parts, (lines[:9], lines[9:]), strict=True):
        part.write_text(json.dumps(cut))
    (out / "results.zip").unlink()
    done = write_submission("coco2014-val", parts, tmp_path / "coco2014-val.json", "alg-1.0", out)
    assert done.upload == out / "results.zip"
    assert (out / "results.zip").read_bytes() == first

    # An archive never holds half a set, nor two algorithms.
    (out / "captions_test2014_alg-1.0_results.json").write_text("[]")
    text = refused("coco2014-val", parts, tmp_path / "coco2014-val.json", "alg-1.0", out)
    assert "0 captions, expected 40,775; write it again with --eval-set coco2014-test" in text
    text = refused("coco2014-val", parts, tmp_path / "coco2014-val.json", "other", out)
    assert "of the algorithm 'alg-1.0'; expected only files of 'other'" in text


@pytest.mark.parametrize(
    ("board", "upload"),
    [
        ("coco2017-test", "captions_test2017_a_results.zip"),
        ("nocaps-val", "nocaps_val_a_results.json"),
        ("nocaps-test", "nocaps_test_a_results.json"),
    ],
)
def test_the_other_sets_are_uploaded_alone(board, upload, tmp_path) -> None:
    done = write_submission(board, [whole(tmp_path, board)], listed(tmp_path, board), "a", tmp_path / "out")
    assert done.upload == tmp_path / "out" / upload
    assert done.upload.is_file()
    assert done.captions == LEADERBOARDS[board].images


def test_a_caption_is_one_line_without_control_characters(tmp_path) -> None:
    odd = ["a\u2028dog\r\nruns", "\x00 \x85tab\there\x9f ", "", "\ud83d", "né 🐕", "שלום"]
    rest = ((3 * number, "a dog") for number in range(len(odd), LEADERBOARDS[SET].images))
    captions = results(tmp_path / "r.json", [*rest, *((3 * number, text) for number, text in enumerate(odd))])
    done = write_submission(SET, [captions], listed(tmp_path, SET), "a", tmp_path)
    lines = json.loads(done.file.read_text(encoding="utf-8"))
    assert [line["caption"] for line in lines[:6]] == ["a dog runs", "tab here", "", "", "né 🐕", "שלום"]
    assert [line["image_id"] for line in lines] == sorted(line["image_id"] for line in lines)
    assert done.empty == 2


def test_an_incomplete_set_is_refused_with_the_ids(tmp_path) -> None:
    images, out = listed(tmp_path, SET), tmp_path / "out"
    lines = json.loads(whole(tmp_path, SET).read_text())
    captions = tmp_path / "r.json"
    captions.write_text(json.dumps([*lines[:-5], {"image_id": 1, "caption": "x"}]))
    text = refused(SET, [captions], images, "a", out)
    assert "4,496 captions, 5 images (0, 3, 6, ...) missing, 1 image (1) of no image in the list" in text
    assert "expected one for each of the 4,500 images" in text
    captions.write_text(json.dumps([*lines, lines[0]]))
    assert "image 13497 has more than one caption" in refused(SET, [captions], images, "a", out)
    text = refused(SET, [tmp_path / f"{SET}-captions.json"] * 2, images, "a", out)
    assert "4,500 images (0, 3, 6, ...) captioned in another part too" in text
    assert not out.exists()


def test_the_official_list_is_required_and_recognized_by_its_length(tmp_path) -> None:
    captions, out = whole(tmp_path, SET), tmp_path / "out"
    text = refused(SET, [captions], None, "a", out)
    assert "no --image-info, expected the official list of nocaps-val" in text
    assert "from https://s3.amazonaws.com/nocaps/nocaps_val_image_info.json" in text
    text = refused(SET, [captions], listed(tmp_path, "nocaps-test"), "a", out)
    assert "lists 10,600 images (as many as nocaps-test has), expected the 4,500 of nocaps-val" in text
    assert "expected the official list of nocaps-val" in refused(SET, [captions], captions, "a", out)
    assert "Is a directory; expected it to be readable" in refused(SET, [captions], tmp_path, "a", out)
    assert "did you mean 'nocaps-val'?" in refused("nocap-val", [captions], None, "a", out)


@pytest.mark.parametrize("name", ["", "two_parts", "../up", "a b", "é", ".hidden", "x\n"])
def test_an_unusable_name_is_refused(name, tmp_path) -> None:
    text = refused(SET, [tmp_path / "none.json"], None, name, tmp_path)
    assert "is delimited by underscores in a file name" in text
