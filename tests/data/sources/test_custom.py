import json
import os
import re

import pytest

from captionscale.data.packing import pack
from captionscale.data.sources import custom
from captionscale.data.sources.record import Record
from captionscale.errors import UserError

CSV = """image,caption
b.jpg,"A dog, a ""hot"" day
and a cat"
cats/a.jpg,Ein Kätzchen
b.jpg, Two dogs
b.jpg,
"""


@pytest.fixture
def images(touch):
    return touch("i", "b.jpg", "cats/a.jpg", "c.png")


def facts(records):
    return [(record.image_id, record.split, record.name, record.captions) for record in records]


# ---- tables


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["t.csv", "t.TSV"])
def test_rows_of_one_image_are_joined_and_images_counted_as_they_appear(images, write, name, ends, mark):
    text = mark + CSV.replace("\n", ends)
    if name == "t.TSV":
        text = text.replace("image,", "image\t").replace("jpg,", "jpg\t")
    assert custom.read_table(write(name, text), images, "val", lambda _: 7) == [
        Record(7, "val", (f'A dog, a "hot" day{ends}and a cat', "Two dogs"), str(images), "b.jpg"),
        Record(8, "val", ("Ein Kätzchen",), str(images), "cats/a.jpg"),
    ]


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson"])
def test_json_lines_are_equivalent_with_one_caption_or_many(images, write, name):
    lines = [
        {"image": "b.jpg", "caption": 'A dog, a "hot" day\nand a cat'},
        {"image": "cats/a.jpg", "caption": ["Ein Kätzchen"]},
        {"image": "b.jpg", "captions": [" Two dogs", ""]},
    ]
    text = "\ufeff" + "\r\n\n".join(map(json.dumps, lines))
    assert custom.read_table(write(name, text), images, "val", lambda _: 7) == custom.read_table(
        write("t.csv", CSV), images, "val", lambda _: 7
    )


def test_a_row_may_name_its_split_and_its_image_id_in_any_order_of_columns(images, write):
    text = "split,image_id,caption,image\ntest,30,a,b.jpg\n,4,b,c.png\ntest,30,c,./b.jpg\n"
    records = custom.read_table(write("t.csv", text), images, "train", lambda _: 1)
    assert facts(records) == [(4, "train", "c.png", ("b",)), (30, "test", "b.jpg", ("a", "c"))]
    keys = text.splitlines()[0].split(",")
    rows = [dict(zip(keys, row.split(","), strict=True)) for row in text.splitlines()[1:]]
    lines = [json.dumps(row | {"image_id": int(row["image_id"])}) for row in rows]
    assert custom.read_table(write("t.jsonl", "\n".join(lines)), images, "train", lambda _: 1) == records


def test_ids_are_counted_from_the_first_id_of_the_splits(images, write):
    asked = []

    def first_image_id(splits):
        asked.append(splits)
        return 40

    table = write("t.csv", "image,caption,split\nc.png,a,val\nb.jpg,b,\n")
    assert facts(custom.read_table(table, images, "train", first_image_id)) == [
        (41, "train", "b.jpg", ("b",)),
        (40, "val", "c.png", ("a",)),
    ]
    assert asked == [{"train", "val"}]


def test_one_image_may_be_written_as_two_paths(images, write):
    table = write("t.csv", "image,caption\ncats/a.jpg,a\n./cats//a.jpg,b\ncats/../cats/a.jpg,c\n")
    assert facts(custom.read_table(table, images, "train", lambda _: 1)) == [
        (1, "train", "cats/a.jpg", ("a", "b", "c"))
    ]


TABLE_FAULTS = {
    "another ending": (
        "t.txt",
        CSV,
        "t.txt: a table's ending gives its layout; expected .csv, .tsv, .jsonl, .ndj",
    ),
    "no header": (
        "t.csv",
        "b.jpg,A dog\n",
        "t.csv: line 1 is 'b.jpg,A dog'; expected the columns image, caption",
    ),
    "an unknown column": (
        "t.csv",
        "image,caption,splt\nb.jpg,a,val\n",
        "line 1 is 'image,caption,splt'; expected",
    ),
    "a column twice": (
        "t.csv",
        "image,caption,caption\nb.jpg,a,b\n",
        "line 1 is 'image,caption,caption'; expected",
    ),
    "semicolons": ("t.csv", "image;caption\nb.jpg;a\n", "line 1 is 'image;caption'; expected the columns"),
    "an empty file": ("t.csv", "", "t.csv: line 1 is ''; expected the columns image, caption"),
    "a comma without quotes": (
        "t.csv",
        "image,caption\nb.jpg,a\nb.jpg,A dog, a cat\n",
        "t.csv: line 3 has 3 fields; expected 2 as in line 1; put a caption with ',' in quotes",
    ),
    "a field too few": (
        "t.csv",
        "image,caption\nb.jpg\n",
        "line 2 has 1 fields; expected 2 as in line 1; put",
    ),
    "a quote that never ends": (
        "t.csv",
        'image,caption\nb.jpg,"A dog\nb.jpg,Two',
        "t.csv: line 3: unexpected end of data; expected a field with quotes in quotes",
    ),
    "a quote that never ends in a long file": (
        "t.csv",
        'image,caption\nb.jpg,"' + "b.jpg,A dog\n" * 20_000,
        "field larger than field limit (131072); expected a field with quotes in quotes",
    ),
    "a quote within quotes": (
        "t.csv",
        'image,caption\nb.jpg,"A "hot" dog"\n',
        "line 2: ',' expected after '\"'",
    ),
    "line ends of a bygone age": (
        "t.csv",
        "image,caption\rb.jpg,a\r",
        "t.csv: line 1: new-line character seen",
    ),
    "no image": ("t.csv", "image,caption\n,a\n", "line 2: Object missing required field `image`; expected"),
    "an id that is none": ("t.csv", "image,caption,image_id\nb.jpg,a,x\n", "line 2: image_id: Expected `int"),
    "an id below zero": (
        "t.csv",
        "image,caption,image_id\nb.jpg,a,-1\n",
        "line 2: image_id: Expected `int` >= 0",
    ),
    "an image without an id": (
        "t.csv",
        "image,caption,image_id\nb.jpg,a,1\nc.png,a,\n",
        "t.csv: 1 image (c.png) of 2 without image_id; expected one for each image or for none; add",
    ),
    "a row without an id": (
        "t.csv",
        "image,caption,image_id\nb.jpg,a,1\nb.jpg,a,\n",
        "line 3: b.jpg has image_id None here, 1 in an earlier row; expected one id for all rows",
    ),
    "two images with one id": (
        "t.csv",
        "image,caption,image_id\nb.jpg,a,1\nc.png,a,1\n",
        "line 3: c.png has image_id 1, which is that of b.jpg; expected an id of its own; correct",
    ),
    "an image in two splits": (
        "t.csv",
        "image,caption,split\nb.jpg,a,train\n./b.jpg,b,test\n",
        "line 3: b.jpg is of split 'test' here, of 'train' in an earlier row; expected it in one split, or",
    ),
    "a split that is no name": (
        "t.csv",
        "image,caption,split\nb.jpg,a,../x\n",
        "line 2: b.jpg is of split '../x'; expected letters",
    ),
    "an empty caption": (
        "t.csv",
        "image,caption\nb.jpg, \n",
        "t.csv: image 1 (b.jpg) has no captions, or only",
    ),
    "a header alone": ("t.csv", "image,caption\n", "t.csv: no images; expected at least one;"),
    "a path that leads out": (
        "t.csv",
        "image,caption\ncats/../../b.jpg,a\n",
        "line 2: image 'cats/../../b.jpg'; e",
    ),
    "an absolute path": (
        "t.csv",
        "image,caption\n/etc/b.jpg,a\n",
        "line 2: image '/etc/b.jpg'; expected a path bel",
    ),
    "the folder itself": ("t.csv", "image,caption\n.,a\n", "line 2: image '.'; expected a path below"),
    "Latin-1": (
        "t.csv",
        b"image,caption\nb.jpg,caf\xe9\n",
        "t.csv: line 2: byte 9 is not UTF-8; expected plain text",
    ),
    "UTF-16": (
        "t.csv",
        CSV.encode("utf-16"),
        "t.csv: line 1: byte 0 is not UTF-8; expected plain text; unpack it,",
    ),
    "an unknown key": (
        "t.jsonl",
        '{"image": "b.jpg", "splt": "val"}',
        "t.jsonl: line 1: Object contains unknown",
    ),
    "a key of two lines": (
        "t.jsonl",
        '{"image": "b.jpg", "a\\nb": 1}',
        "line 1: Object contains unknown field `a b`; e",
    ),
    "a caption that is no text": (
        "t.jsonl",
        '\n{"image": "b.jpg", "caption": 1}',
        "line 2: caption: Expected `str",
    ),
    "a list": (
        "t.jsonl",
        '[{"image": "b.jpg"}]',
        "line 1: Expected `object`, got `array`; expected one object a line",
    ),
    "an object over many lines": (
        "t.jsonl",
        '{\n"image": "b.jpg"}',
        "line 1: not JSON: Input data was truncated; e",
    ),
    "no caption": (
        "t.jsonl",
        '{"image": "b.jpg"}',
        "t.jsonl: image 1 (b.jpg) has no captions, or only empty ones",
    ),
    "Latin-1 in JSON": (
        "t.jsonl",
        b'{"image": "caf\xe9"}',
        "t.jsonl: line 1: not JSON: 'utf-8' codec can't decode",
    ),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_a_faulty_table_is_refused_with(tmp_path, images, write, fault):
    name, content, words = TABLE_FAULTS[fault]
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        custom.read_table(write(name, content), images, "train", lambda _: 1)
    assert str(refused.value).startswith(f"{tmp_path}/{name}: ")
    assert str(refused.value).count(";") >= 2
    assert "\n" not in str(refused.value)


# ---- folders


def test_images_anywhere_below_a_folder_have_their_captions_next_to_them(touch, write):
    images = touch(
        "i", "b.jpg", "a.b.PNG", "z/deep/1.jpeg", ".hidden.jpg", ".git/1.jpg", "x/._1.jpg", "z/notes.md"
    )
    write("i/b.txt", b"\xef\xbb\xbfA dog\r\n\r\n Two dogs \r\n")
    write("i/a.b.TXT", "A cat\x0bor two\n")
    write("i/z/deep/1.txt", "Drei")
    write("i/LICENSE.txt", "all rights")
    assert custom.read_folder(images, "train", lambda _: 5) == [
        Record(5, "train", ("A cat\x0bor two",), str(images), "a.b.PNG"),
        Record(6, "train", ("A dog", "Two dogs"), str(images), "b.jpg"),
        Record(7, "train", ("Drei",), str(images), "z/deep/1.jpeg"),
    ]


def test_a_folder_without_texts_can_be_captioned_only(touch):
    images = touch(
        "i", *(f"{n}.{ending}" for n, ending in enumerate(("jpg", "png", "webp", "bmp", "gif"))), "2.jpg"
    )
    records = custom.read_folder(images, "test", lambda splits: len(splits) + 10)
    assert facts(records)[:3] == [
        (11, "test", "0.jpg", ()),
        (12, "test", "1.png", ()),
        (13, "test", "2.jpg", ()),
    ]
    assert len(records) == 6


def test_links_are_followed_but_no_folder_is_read_twice(touch):
    elsewhere = touch("elsewhere", "2.jpg")
    images = touch("i", "1.jpg", "sub/3.jpg")
    (images / "link").symlink_to(elsewhere)
    assert [record.name for record in custom.read_folder(images, "test", lambda _: 1)] == [
        "1.jpg",
        "link/2.jpg",
        "sub/3.jpg",
    ]
    (images / "sub" / "loop").symlink_to(images)
    with pytest.raises(
        UserError, match=r"/i/sub/loop: leads to .*/i again; expected each folder once; delete the"
    ):
        custom.read_folder(images, "test", lambda _: 1)


def test_faulty_folders_are_refused(tmp_path, touch, write):
    with pytest.raises(
        UserError, match=r"/none: No such file or directory; expected it to be readable; check the"
    ):
        custom.read_folder(tmp_path / "none", "test", lambda _: 1)
    with pytest.raises(
        UserError, match=r"/file: Not a directory; expected it to be readable; check the path"
    ):
        custom.read_folder(write("file", "x"), "test", lambda _: 1)
    with pytest.raises(
        UserError, match=r"/i: no images; expected .jpg, .jpeg, .*, .gif here or below; check"
    ):
        custom.read_folder(touch("i", "a.txt", ".b.jpg"), "test", lambda _: 1)
    images = touch("i", *(f"{n}.jpg" for n in range(1, 6)))
    write("i/4.txt", "four")
    with pytest.raises(
        UserError, match=r"/i: 4 images \(1.jpg, 2.jpg, 3.jpg, ...\) of 5 without a .txt next to"
    ):
        custom.read_folder(images, "test", lambda _: 1)
    for n in range(1, 6):
        write(f"i/{n}.txt", "  \n" if n == 2 else "a")
    with pytest.raises(
        UserError, match=r"/i/2.txt: the file is empty; expected text; write or download it again"
    ):
        custom.read_folder(images, "test", lambda _: 1)
    write("i/2.txt", b"caf\xe9")
    with pytest.raises(
        UserError, match=r"/i/2.txt: byte 3 is not UTF-8; expected plain text; unpack it, save it"
    ):
        custom.read_folder(images, "test", lambda _: 1)
    (images / "2.png").touch()
    with pytest.raises(
        UserError, match=r"/i/2.txt: next to 2\.(jpg|png) and 2\.(jpg|png); expected a name of its"
    ):
        custom.read_folder(images, "test", lambda _: 1)


def test_a_name_that_is_not_utf8_is_refused(tmp_path, touch):
    images = touch("i")
    try:
        (images / os.fsdecode(b"caf\xe9.jpg")).touch()
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    with pytest.raises(
        UserError, match=r"caf\\udce9.jpg': the name is not UTF-8; expected one that is; rename"
    ):
        pack(custom.read_folder(images, "test", lambda _: 1), tmp_path / "out", sources=[])


def test_a_real_folder_of_images_is_read(real_data):
    records = custom.read_folder(real_data / "coco_sample", "test", lambda _: 1)
    assert len(records) == 204
    assert records[0].name.startswith("train2017/")
    assert all(record.read().startswith(b"\xff\xd8") for record in records[::50])
