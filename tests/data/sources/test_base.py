import re

import pytest

from captionscale.data.sources import coco, custom, flickr, karpathy
from captionscale.errors import UserError


def read_coco(write, images, names):
    ids = range(1, len(names) + 1)
    content = {
        "images": [{"id": n, "file_name": name} for n, name in zip(ids, names, strict=True)],
        "annotations": [{"image_id": n, "caption": "a"} for n in ids],
    }
    return coco.read_official(images, write("captions.csv", content), "val")


def read_flickr(write, images, names):
    return flickr.read(images, write("captions.csv", "".join(f"{name}#0\ta\n" for name in names)), None)


def read_karpathy(write, images, names):
    rows = [{"filename": name, "split": "val", "sentences": [{"raw": "a"}]} for name in names]
    return karpathy.read(images, write("captions.csv", {"dataset": "flickr8k", "images": rows}), "train")


def read_table(write, images, names):
    rows = "".join(f"{name},a\n" for name in names)
    return custom.read_table(write("captions.csv", f"image,caption\n{rows}"), images, "val", lambda _: 1)


readers = pytest.mark.parametrize("read", [read_coco, read_flickr, read_karpathy, read_table])


@readers
def test_missing_images_are_counted_and_the_first_three_named(touch, write, read):
    images = touch("i", "3_c.jpg")
    with pytest.raises(
        UserError, match=r"/i: 4 images \(1_a.jpg, 2_b.jpg, 4_d.jpg, \.\.\.\) of 5 missing; expected"
    ):
        read(write, images, [f"{n}_{letter}.jpg" for n, letter in enumerate("abcde", 1)])
    with pytest.raises(UserError, match=r"/i: 1 image \(1_a.jpg\) of 2 missing; .* or download them$"):
        read(write, images, ["3_c.jpg", "1_a.jpg"])


@readers
def test_the_subfolder_with_the_images_is_named(touch, write, read):
    inner = touch("i", "annotations/x", "train2017/1_a.jpg") / "train2017"
    (inner.parent / "a link to itself").symlink_to("a link to itself")
    with pytest.raises(UserError, match=f"; give the folder {inner}$"):
        read(write, inner.parent, ["1_a.jpg"])
    (record,) = read(write, inner, ["1_a.jpg"])
    assert (record.source, record.name, record.place) == (str(inner), "1_a.jpg", f"{inner}/1_a.jpg")


@readers
def test_an_image_folder_that_is_none_is_refused(tmp_path, write, read):
    with pytest.raises(
        UserError, match=r"/i: No such file or directory; expected the folder of the images; check"
    ):
        read(write, tmp_path / "i", ["1_a.jpg"])
    with pytest.raises(
        UserError, match=r"/captions.csv: Not a directory; expected the folder of the images; ch"
    ):
        read(write, tmp_path / "captions.csv", ["1_a.jpg"])


@pytest.mark.parametrize(
    "read",
    [
        lambda images, captions: coco.read_official(images, captions, "val"),
        lambda images, captions: flickr.read(images, captions, None),
        lambda images, captions: karpathy.read(images, captions, "train"),
        lambda images, captions: custom.read_table(captions, images, "val", lambda _: 1),
    ],
)
def test_a_caption_file_that_cannot_be_read_is_refused(tmp_path, touch, write, read):
    images = touch("i")
    with pytest.raises(
        UserError, match=r"/none.csv: No such file or directory; expected it to be readable; ch"
    ):
        read(images, tmp_path / "none.csv")
    with pytest.raises(
        UserError, match=r"/a.csv: Is a directory; expected it to be readable; check the path"
    ):
        read(images, touch("a.csv"))
    with pytest.raises(UserError, match=r"/zip.csv: .*UTF-8|/zip.csv: not JSON") as refused:
        read(images, write("zip.csv", b"PK\x03\x04\xff"))
    assert "\n" not in str(refused.value)


def test_names_that_would_break_a_line_are_shown_in_quotes(touch, write):
    with pytest.raises(UserError, match=re.escape(r"1 image ('a\nb.jpg') of 1 missing")):
        read_coco(write, touch("i"), ["a\nb.jpg"])


def test_a_damaged_name_of_any_length_is_shown_in_part(touch, write):
    with pytest.raises(UserError, match=r"1 image \(9{120}\) of 1 missing"):
        read_coco(write, touch("i"), ["9" * 5000])


def test_a_subfolder_that_is_not_there_makes_its_images_missing(touch, write):
    with pytest.raises(UserError, match=r"2 images \(cta/2.jpg, 1.jpg/3.jpg\) of 3 missing"):
        read_table(write, touch("i", "1.jpg", "cat/2.jpg"), ["1.jpg", "cta/2.jpg", "1.jpg/3.jpg"])


def test_a_relative_folder_is_as_good_as_an_absolute_one(tmp_path, touch, write, monkeypatch):
    touch("i", "sub/1.jpg").joinpath("sub/1.jpg").write_bytes(b"image")
    monkeypatch.chdir(tmp_path)
    for images, name in (("i", "sub/1.jpg"), ("i/sub/..", "./sub/1.jpg"), (".", "i/sub/1.jpg")):
        (record,) = read_coco(write, type(tmp_path)(images), [name])
        assert record.read() == b"image"
    with pytest.raises(UserError, match=r"^i/sub: 1 image \(sub/1.jpg\) .*; give the folder i$"):
        read_coco(write, type(tmp_path)("i/sub"), ["sub/1.jpg"])
