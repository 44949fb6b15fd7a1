import json
import re
from collections import Counter
from pathlib import Path

import pytest

from captionscale.data.sources import Record, coco, flickr
from captionscale.errors import UserError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here")

CSV = """image,caption
30_b.jpg,"A dog , a cat and a "" hot "" day ."
30_b.jpg,Two dogs
4_a.jpg,A child in a pink dress .
"""
TOKEN = """30_b.jpg#0\tA dog , a cat and a " hot " day .
30_b.jpg#1\tTwo dogs
4_a.jpg#0\tA child in a pink dress .
"""
BARS = """image_name| comment_number| comment
30_b.jpg| 0| A dog , a cat and a " hot " day .
30_b.jpg| 1   Two dogs
4_a.jpg| 0| A child in a pink dress .
"""


def folder(path, *names):
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco_document(images, captions):
    return {
        "images": [{"id": key, "file_name": name} for key, name in images.items()],
        "annotations": [{"image_id": key, "caption": caption} for key, caption in captions],
    }


# ---- COCO


@pytest.mark.parametrize("name", ["COCO_val2014_{:012}.jpg", "{:012}.jpg"])
def test_coco_records_come_by_image_id_with_captions_in_the_order_of_the_file(tmp_path, name):
    images = folder(tmp_path / "val", name.format(9), name.format(5), "unlisted.jpg")
    document = coco_document(
        {9: name.format(9), 5: name.format(5)}, [(5, " b\n"), (9, "z"), (5, "a"), (9, " ")]
    )
    assert coco(images, write(tmp_path / "captions.json", document), "val") == [
        Record(5, images / name.format(5), "val", ("b", "a")),
        Record(9, images / name.format(9), "val", ("z",)),
    ]


def test_a_coco_image_may_have_more_than_five_captions(tmp_path):
    document = coco_document({1: "1.jpg"}, [(1, f"caption {n}") for n in range(7)])
    (record,) = coco(folder(tmp_path / "i", "1.jpg"), write(tmp_path / "c.json", document), "test")
    assert record.captions == tuple(f"caption {n}" for n in range(7))


COCO_FAULTS = {
    "a list": ([], "c.json: no list 'images' (found list); wanted COCO captions"),
    "Karpathy's file": (
        {"images": [{"filename": "1.jpg", "imgid": 0, "sentences": []}], "dataset": "coco"},
        "images[0] has no 'id'; wanted COCO captions",
    ),
    "an instances file": (
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]},
        "annotations[0] has no 'caption'; wanted COCO captions",
    ),
    "an image_info file": (
        {"images": [{"id": 1, "file_name": "1.jpg"}], "info": {}},
        "no list 'annotations' (found images, info); wanted COCO captions",
    ),
    "items that are no objects": ({"images": [1], "annotations": []}, "images[0] has no 'id'"),
    "an id in quotes": ({"images": [{"id": "1", "file_name": "1.jpg"}]}, "images[0] has 'id': '1'; wanted"),
    "a caption that is null": (
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": None}]},
        "annotations[0] has no 'caption'",
    ),
    "no images": (coco_document({}, []), "c.json: no images; wanted at least one;"),
    "an image without captions": (
        coco_document({1: "1.jpg"}, []),
        "c.json: image 1 has no captions; wanted at",
    ),
    "an image with an empty caption": (
        coco_document({1: "1.jpg"}, [(1, " ")]),
        "image 1 has only empty captions;",
    ),
    "a caption of no image": (
        coco_document({1: "1.jpg"}, [(1, "a"), (2, "b")]),
        "annotations[1] has image_id 2, which is not in 'images'; wanted one that is; delete",
    ),
    "an image id twice": (
        {"images": [{"id": 1, "file_name": "1.jpg"}] * 2, "annotations": []},
        "images[1] repeats image id 1; wanted each id once; delete one",
    ),
    "a file cut short": (
        '{"images": [{"id": 1,',
        "c.json: not JSON: Expecting property name enclosed in double",
    ),
    "brackets without end": ("[" * 100_000, "c.json: not JSON:"),
    "an empty file": (" \n", "c.json: the file is empty; wanted text; download it again"),
}


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_a_faulty_coco_file_is_refused_with(tmp_path, fault):
    content, words = COCO_FAULTS[fault]
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        coco(folder(tmp_path / "i", "1.jpg"), write(tmp_path / "c.json", content), "val")
    assert str(refused.value).startswith(f"{tmp_path}/c.json: ")
    assert str(refused.value).count(";") >= 2
    assert "\n" not in str(refused.value)


def test_a_file_cut_short_is_refused_with_the_position(tmp_path):
    captions = write(tmp_path / "c.json", '{"images":\n [{"id": 1},')
    with pytest.raises(UserError, match=r"line 2 column \d+ \(char \d+\)"):
        coco(folder(tmp_path / "i"), captions, "val")


# ---- files and folders, alike for both readers


def read_coco(tmp_path, images, names):
    document = coco_document(dict(enumerate(names, 1)), [(n, "a") for n in range(1, len(names) + 1)])
    return coco(images, write(tmp_path / "captions", document), "val")


def read_flickr(tmp_path, images, names):
    return flickr(
        images, write(tmp_path / "captions", "".join(f"{name}#0\ta\n" for name in names)), None, "val"
    )


readers = pytest.mark.parametrize("read", [read_coco, read_flickr])


@readers
def test_missing_images_are_counted_and_the_first_three_named(tmp_path, read):
    images = folder(tmp_path / "i", "3_c.jpg")
    with pytest.raises(
        UserError, match=r"/i: 4 images \(1_a.jpg, 2_b.jpg, 4_d.jpg, \.\.\.\) of 5 missing; wanted"
    ):
        read(tmp_path, images, [f"{n}_{letter}.jpg" for n, letter in enumerate("abcde", 1)])
    with pytest.raises(UserError, match=r"/i: 1 image \(1_a.jpg\) of 2 missing"):
        read(tmp_path, images, ["3_c.jpg", "1_a.jpg"])


@readers
def test_the_folder_inside_that_holds_the_images_is_named(tmp_path, read):
    inner = folder(folder(tmp_path / "i") / "train2017", "1_a.jpg")
    folder(tmp_path / "i" / "annotations")
    with pytest.raises(UserError, match=f"; give the folder {inner}$"):
        read(tmp_path, tmp_path / "i", ["1_a.jpg"])
    assert read(tmp_path, inner, ["1_a.jpg"])[0].file == inner / "1_a.jpg"


@readers
def test_an_image_folder_that_is_none_is_refused(tmp_path, read):
    with pytest.raises(
        UserError, match="/i: No such file or directory; wanted the folder of the images; check"
    ):
        read(tmp_path, tmp_path / "i", ["1_a.jpg"])
    with pytest.raises(UserError, match="/captions: Not a directory; wanted the folder of the images; check"):
        read(tmp_path, tmp_path / "captions", ["1_a.jpg"])


@pytest.mark.parametrize(
    "read", [coco, lambda images, captions, split: flickr(images, captions, None, split)]
)
def test_a_caption_file_that_is_no_text_is_refused(tmp_path, read):
    images = folder(tmp_path / "i")
    with pytest.raises(
        UserError, match="/none: No such file or directory; wanted a text file; check the path"
    ):
        read(images, tmp_path / "none", "val")
    with pytest.raises(UserError, match="/i: Is a directory; wanted a text file; check the path"):
        read(images, images, "val")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04\xff")
    with pytest.raises(UserError, match="/zip: byte 4 is not UTF-8; wanted plain text; unpack it"):
        read(images, tmp_path / "zip", "val")


# ---- Flickr8k and Flickr30k


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("content", [CSV, TOKEN, BARS])
def test_every_flickr_layout_gives_the_same_records(tmp_path, content, ends):
    images = folder(tmp_path / "i", "30_b.jpg", "4_a.jpg")
    (tmp_path / "any name").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", ends).encode())
    assert flickr(images, tmp_path / "any name", None, "test") == [
        Record(4, images / "4_a.jpg", "test", ("A child in a pink dress .",)),
        Record(30, images / "30_b.jpg", "test", ('A dog , a cat and a " hot " day .', "Two dogs")),
    ]


def test_the_line_of_kaggles_flickr30k_that_lacks_its_second_bar_is_read(tmp_path):
    lines = ["image_name| comment_number| comment"]
    lines += [f"2199200615.jpg| {n}| Caption {n} | with a bar ." for n in range(4)]
    lines += ["2199200615.jpg| 4   A dog runs across the grass ."]
    images = folder(tmp_path / "i", "2199200615.jpg")
    (record,) = flickr(images, write(tmp_path / "results.csv", "\n".join(lines)), None)
    assert record.image_id == 2199200615
    assert record.captions[3:] == ("Caption 3 | with a bar .", "A dog runs across the grass .")


def test_captions_stand_by_their_number_whatever_the_order_of_the_lines(tmp_path):
    shuffled = "".join(f"1.jpg#{n}\tcaption {n}\n" for n in (10, 2, 0, 9, 1))
    (record,) = flickr(folder(tmp_path / "i", "1.jpg"), write(tmp_path / "t", shuffled), None)
    assert record.captions == tuple(f"caption {n}" for n in (0, 1, 2, 9, 10))


def test_a_csv_caption_may_hold_commas_without_quotes(tmp_path):
    captions = write(tmp_path / "t", 'image,caption\n1.jpg,A dog, a cat\n1.jpg,\n1.jpg,""\n')
    (record,) = flickr(folder(tmp_path / "i", "1.jpg"), captions, None)
    assert record.captions == ("A dog, a cat",)


def test_the_unpublished_image_of_flickr8k_is_left_out(tmp_path):
    text = "2258277193_586949ec62.jpg.1#0\tTwo dogs\n2258277193_586949ec62.jpg#0\tTwo dogs\n"
    images = folder(tmp_path / "i", "2258277193_586949ec62.jpg")
    (record,) = flickr(images, write(tmp_path / "t", text), None)
    assert record.file.name == "2258277193_586949ec62.jpg"


@pytest.mark.parametrize(
    "names",
    [
        ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"),
        ("train.txt", "val.txt", "test.txt"),
    ],
)
@pytest.mark.parametrize("ending", [".jpg", ""])
def test_lists_put_each_image_in_its_split_and_leave_the_others_out(tmp_path, names, ending):
    images = folder(tmp_path / "i", *(f"{n}.jpg" for n in range(1, 7)))
    captions = write(tmp_path / "captions.txt", "".join(f"{n}.jpg#0\tcaption {n}\n" for n in range(1, 8)))
    for name, numbers in zip(names, [(6, 2), (5,), (1, 3)], strict=True):
        write(tmp_path / name, "\n".join(f"{n}{ending}" for n in numbers) + "\n\n")
    write(tmp_path / "mytrain.txt", "4.jpg")
    records = flickr(images, captions, tmp_path)
    assert [(record.split, record.image_id) for record in records] == [
        ("train", 2),
        ("train", 6),
        ("val", 5),
        ("test", 1),
        ("test", 3),
    ]


def test_one_list_is_enough(tmp_path):
    captions = write(tmp_path / "captions.txt", TOKEN)
    write(tmp_path / "Flickr_8k.devImages.txt", "30_b.jpg\n")
    (record,) = flickr(folder(tmp_path / "i", "30_b.jpg"), captions, tmp_path, "ignored")
    assert (record.image_id, record.split) == (30, "val")


FLICKR_FAULTS = {
    "another layout": (
        "once upon a time\n",
        "t: line 1 is 'once upon a time'; wanted image,caption or image_name|",
    ),
    "Karpathy's json": ('{"images": []}', "t: line 1 is '{\"images\": []}'; wanted image,caption or"),
    "a line without a tab": (
        TOKEN + "5.jpg#0 A dog\n",
        "t: line 4 is '5.jpg#0 A dog'; wanted name.jpg#number<TAB>",
    ),
    "a line without bars": (
        BARS + "5.jpg 0 A dog\n",
        "t: line 5 is '5.jpg 0 A dog'; wanted name.jpg| number| cap",
    ),
    "a quote that never ends": (
        CSV + '5.jpg,"A dog\n4_a.jpg,Two\n',
        't: line 5 is \'5.jpg,"A dog\'; wanted name.jpg,caption or name.jpg,"caption, with commas"; correct',
    ),
    "a header alone": ("image,caption\n", "t: no images; wanted at least one;"),
    "only empty captions": ("4_a.jpg#0\t\n4_a.jpg#1\t \n", "t: image 4 has only empty captions; wanted"),
    "a name without a number": (
        TOKEN + "dog.jpg#0\tA dog\n",
        "t: image 'dog.jpg' has no number; wanted its own",
    ),
    "a number beyond 64 bits": (
        f"{2**64}.jpg#0\tA dog\n",
        "t: image '18446744073709551616.jpg' has no number",
    ),
    "two names with one number": (
        TOKEN + "4_b.jpg#0\tA dog\n",
        "t: image '4_b.jpg' has the number of 4_a.jpg;",
    ),
}


@pytest.mark.parametrize("fault", FLICKR_FAULTS)
def test_a_faulty_flickr_file_is_refused_with(tmp_path, fault):
    content, words = FLICKR_FAULTS[fault]
    images = folder(tmp_path / "i", "30_b.jpg", "4_a.jpg", "5.jpg", "4_b.jpg", "dog.jpg")
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        flickr(images, write(tmp_path / "t", content), None)
    assert str(refused.value).startswith(f"{tmp_path}/t: ")
    assert "\n" not in str(refused.value)


LIST_FAULTS = {
    "an image in two splits": (
        {"train.txt": "30_b.jpg\n4_a.jpg", "Flickr_8k.testImages.txt": "4_a"},
        "train.txt: 4_a.jpg is in a test list too; wanted it in one split,",
    ),
    "a listed image without captions": (
        {"val.txt": "30_b.jpg\n5.jpg\n"},
        "lists: 1 image (5.jpg) listed, but not in ",
    ),
    "an empty list": (
        {"train.txt": "30_b.jpg", "test.txt": "\n"},
        "test.txt: the file is empty; wanted text;",
    ),
    "no list": ({"captions.txt": TOKEN}, "lists: no split list; wanted Flickr_8k.trainImages.txt or "),
}


@pytest.mark.parametrize("fault", LIST_FAULTS)
def test_faulty_split_lists_are_refused_with(tmp_path, fault):
    lists, words = LIST_FAULTS[fault]
    splits = folder(tmp_path / "lists")
    for name, content in lists.items():
        write(splits / name, content)
    with pytest.raises(UserError, match=re.escape(words)):
        flickr(folder(tmp_path / "i", "30_b.jpg", "4_a.jpg"), write(tmp_path / "t", TOKEN), splits)


def test_a_folder_of_lists_that_is_none_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="/lists: No such file or directory; wanted the folder of the split lists;"
    ):
        flickr(folder(tmp_path / "i"), write(tmp_path / "t", TOKEN), tmp_path / "lists")


# ---- the real data sets


@real_data
def test_both_layouts_of_flickr8k_give_the_same_records():
    root = DATA / "flickr8k"
    by_csv = flickr(root / "Images", root / "captions.txt", root)
    assert by_csv == flickr(root / "Images", root / "Flickr8k.token.txt", root)
    assert Counter(record.split for record in by_csv) == {"train": 6000, "val": 1000}
    assert {len(record.captions) for record in by_csv} == {5}
    assert len(flickr(root / "Images", root / "captions.txt", None)) == 7000


@real_data
def test_the_real_coco_sample_is_read_whole():
    root = DATA / "coco_sample"
    for split, images in [("train", 144), ("val", 60)]:
        records = coco(root / f"{split}2017", root / "annotations" / f"captions_{split}2017.json", split)
        assert len(records) == images
        assert sum(len(record.captions) for record in records) == 5 * images
        assert all(record.file.name == f"{record.image_id:012}.jpg" for record in records)


@real_data
def test_the_real_file_of_coco_2014_gives_25010_captions(tmp_path):
    captions = DATA / "coco_karpathy" / "captions_test5k.json"
    document = json.loads(captions.read_text())
    records = coco(
        folder(tmp_path / "i", *(image["file_name"] for image in document["images"])), captions, "test"
    )
    assert Counter(len(record.captions) for record in records) == {5: 4990, 6: 10}
    with pytest.raises(UserError, match=r"images\[0\] has no 'id'; wanted COCO captions"):
        coco(tmp_path / "i", captions.with_name("dataset_coco_format_example.json"), "test")
