import re
from collections import Counter

import pytest

from captionscale.data.sources import flickr
from captionscale.data.sources.record import Record
from captionscale.errors import UserError

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


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("content", [CSV, TOKEN, BARS])
def test_every_flickr_layout_gives_the_same_records(tmp_path, content, ends, touch):
    images = touch("i", "30_b.jpg", "4_a.jpg")
    (tmp_path / "any name").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", ends).encode())
    assert flickr.read(images, tmp_path / "any name", None) == [
        Record(4, "train", ("A child in a pink dress .",), str(images), "4_a.jpg"),
        Record(30, "train", ('A dog , a cat and a " hot " day .', "Two dogs"), str(images), "30_b.jpg"),
    ]


def test_the_line_of_kaggles_flickr30k_that_lacks_its_second_bar_is_read(touch, write):
    lines = ["image_name| comment_number| comment"]
    lines += [f"2199200615.jpg| {n}| Caption {n} | with a bar ." for n in range(4)]
    lines += ["2199200615.jpg| 4   A dog runs across the grass ."]
    images = touch("i", "2199200615.jpg")
    (record,) = flickr.read(images, write("results.csv", "\n".join(lines)), None)
    assert record.image_id == 2199200615
    assert record.captions[3:] == ("Caption 3 | with a bar .", "A dog runs across the grass .")


def test_captions_are_sorted_by_their_number(touch, write):
    shuffled = "".join(f"1.jpg#{n}\tcaption {n}\n" for n in (10, 2, 0, 9, 1))
    (record,) = flickr.read(touch("i", "1.jpg"), write("t", shuffled), None)
    assert record.captions == tuple(f"caption {n}" for n in (0, 1, 2, 9, 10))


def test_a_csv_caption_may_hold_commas_without_quotes(touch, write):
    captions = write("t", 'image,caption\n1.jpg,A dog, a cat\n1.jpg,\n1.jpg,""\n')
    (record,) = flickr.read(touch("i", "1.jpg"), captions, None)
    assert record.captions == ("A dog, a cat",)


def test_the_unpublished_image_of_flickr8k_is_left_out(touch, write):
    text = "2258277193_586949ec62.jpg.1#0\tTwo dogs\n2258277193_586949ec62.jpg#0\tTwo dogs\n"
    images = touch("i", "2258277193_586949ec62.jpg")
    (record,) = flickr.read(images, write("t", text), None)
    assert record.name == "2258277193_586949ec62.jpg"


@pytest.mark.parametrize(
    "names",
    [
        ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"),
        ("train.txt", "val.txt", "test.txt"),
    ],
)
@pytest.mark.parametrize("ending", [".jpg", ""])
def test_lists_put_each_image_in_its_split_and_leave_the_others_out(tmp_path, names, ending, touch, write):
    images = touch("i", *(f"{n}.jpg" for n in range(1, 7)))
    captions = write("captions.txt", "".join(f"{n}.jpg#0\tcaption {n}\n" for n in range(1, 8)))
    for name, numbers in zip(names, [(6, 2), (5,), (1, 3)], strict=True):
        write(name, "\n".join(f"{n}{ending}" for n in numbers) + "\n\n")
    write("mytrain.txt", "4.jpg")
    records = flickr.read(images, captions, tmp_path)
    assert [(record.split, record.image_id) for record in records] == [
        ("train", 2),
        ("train", 6),
        ("val", 5),
        ("test", 1),
        ("test", 3),
    ]


def test_one_list_is_enough(tmp_path, touch, write):
    captions = write("captions.txt", TOKEN)
    write("Flickr_8k.devImages.txt", "30_b.jpg\n")
    (record,) = flickr.read(touch("i", "30_b.jpg"), captions, tmp_path)
    assert (record.image_id, record.split) == (30, "val")


FLICKR_FAULTS = {
    "another layout": (
        "once upon a time\n",
        "t: line 1 is 'once upon a time'; expected image,caption or image_name|",
    ),
    "Karpathy's json": ('{"images": []}', "t: line 1 is '{\"images\": []}'; expected image,caption or"),
    "a line without a tab": (
        TOKEN + "5.jpg#0 A dog\n",
        "t: line 4 is '5.jpg#0 A dog'; expected name.jpg#number<TAB>",
    ),
    "a line without bars": (
        BARS + "5.jpg 0 A dog\n",
        "t: line 5 is '5.jpg 0 A dog'; expected name.jpg| number| cap",
    ),
    "a quote that never ends": (
        CSV + '5.jpg,"A dog\n4_a.jpg,Two\n',
        't: line 5 is \'5.jpg,"A dog\'; expected name.jpg,caption or name.jpg,"caption, with commas"',
    ),
    "a header alone": ("image,caption\n", "t: no images; expected at least one;"),
    "only empty captions": (
        "4_a.jpg#0\t\n4_a.jpg#1\t \n",
        "t: image 4 (4_a.jpg) has no captions, or only empty ones; expected",
    ),
    "a name without a number": (
        TOKEN + "dog.jpg#0\tA dog\n",
        "t: image dog.jpg has no number; expected its own",
    ),
    "a number beyond 64 bits": (
        f"{2**64}.jpg#0\tA dog\n",
        "t: image 18446744073709551616.jpg has no number",
    ),
    "two names with one number": (
        TOKEN + "4_b.jpg#0\tA dog\n",
        "t: image 4_b.jpg has the number of 4_a.jpg;",
    ),
}


@pytest.mark.parametrize("fault", FLICKR_FAULTS)
def test_a_faulty_flickr_file_is_refused_with(tmp_path, fault, touch, write):
    content, words = FLICKR_FAULTS[fault]
    images = touch("i", "30_b.jpg", "4_a.jpg", "5.jpg", "4_b.jpg", "dog.jpg")
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        flickr.read(images, write("t", content), None)
    assert str(refused.value).startswith(f"{tmp_path}/t: ")
    assert "\n" not in str(refused.value)


LIST_FAULTS = {
    "an image in two splits": (
        {"train.txt": "30_b.jpg\n4_a.jpg", "Flickr_8k.testImages.txt": "4_a"},
        "train.txt: 4_a.jpg is in the list of test too; expected it in one split,",
    ),
    "a listed image without captions": (
        {"val.txt": "30_b.jpg\n5.jpg\n"},
        "lists: 1 image (5.jpg) listed, but not in ",
    ),
    "an empty list": (
        {"train.txt": "30_b.jpg", "test.txt": "\n"},
        "test.txt: the file is empty; expected text;",
    ),
    "no list": ({"captions.txt": TOKEN}, "lists: no split list; expected Flickr_8k.trainImages.txt or "),
}


@pytest.mark.parametrize("fault", LIST_FAULTS)
def test_faulty_split_lists_are_refused_with(fault, touch, write):
    lists, words = LIST_FAULTS[fault]
    splits = touch("lists")
    for name, content in lists.items():
        write(f"lists/{name}", content)
    with pytest.raises(UserError, match=re.escape(words)):
        flickr.read(touch("i", "30_b.jpg", "4_a.jpg"), write("t", TOKEN), splits)


def test_a_folder_of_lists_that_is_none_is_refused(tmp_path, touch, write):
    with pytest.raises(
        UserError, match=r"/lists: No such file or directory; expected the folder of the split lists;"
    ):
        flickr.read(touch("i"), write("t", TOKEN), tmp_path / "lists")


def test_both_layouts_of_flickr8k_give_the_same_records(real_data):
    root = real_data / "flickr8k"
    by_csv = flickr.read(root / "Images", root / "captions.txt", root)
    assert by_csv == flickr.read(root / "Images", root / "Flickr8k.token.txt", root)
    assert Counter(record.split for record in by_csv) == {"train": 6000, "val": 1000}
    assert {len(record.captions) for record in by_csv} == {5}
    assert len(flickr.read(root / "Images", root / "captions.txt", None)) == 7000
    assert by_csv[0].read().startswith(b"\xff\xd8")
