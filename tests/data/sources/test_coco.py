import re
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from captionscale.data.sources import coco
from captionscale.data.sources.record import Record
from captionscale.errors import UserError


def document(images, captions):
    return {
        "info": {"year": 2014},
        "images": [{"license": 1, "id": key, "file_name": name} for key, name in images.items()],
        "annotations": [
            {"id": n, "image_id": key, "caption": caption} for n, (key, caption) in enumerate(captions)
        ],
    }


# ---- the official files


@pytest.mark.parametrize("name", ["COCO_val2014_{:012}.jpg", "{:012}.jpg"])
def test_records_come_by_image_id_with_captions_in_the_order_of_the_file(touch, write, name):
    images = touch("val", name.format(9), name.format(5), "unlisted.jpg")
    captions = [(5, " b\n"), (9, "z"), (5, "a"), (9, " ")]
    file = write("captions.json", document({9: name.format(9), 5: name.format(5)}, captions))
    assert coco.read_official(images, file, "val") == [
        Record(5, "val", ("b", "a"), str(images), name.format(5)),
        Record(9, "val", ("z",), str(images), name.format(9)),
    ]


def test_an_image_may_have_more_than_five_captions(touch, write):
    file = write("c.json", document({1: "1.jpg"}, [(1, f"caption {n}") for n in range(7)]))
    (record,) = coco.read_official(touch("i", "1.jpg"), file, "test")
    assert record.captions == tuple(f"caption {n}" for n in range(7))


def test_a_folder_before_the_file_name_becomes_part_of_the_source(touch, write):
    images = touch("i", "val2017/1.jpg")
    (record,) = coco.read_official(
        images, write("c.json", document({1: "./val2017/1.jpg"}, [(1, "a")])), "val"
    )
    assert (record.source, record.name) == (f"{images}/val2017", "1.jpg")


def test_a_list_of_images_without_annotations_has_no_captions(touch, write):
    content = document({2: "COCO_test2014_000000000002.jpg", 1: "COCO_test2014_000000000001.jpg"}, [])
    del content["annotations"]
    content["categories"] = [{"id": 1, "name": "person"}]
    images = touch("i", *(image["file_name"] for image in content["images"]))
    records = coco.read_official(images, write("image_info_test2014.json", content), "test")
    assert [(record.image_id, record.captions) for record in records] == [(1, ()), (2, ())]


def test_the_largest_id_of_64_bits_is_one(touch, write):
    (record,) = coco.read_official(
        touch("i", "1.jpg"), write("c.json", document({2**63 - 1: "1.jpg"}, [(2**63 - 1, "a")])), "val"
    )
    assert record.image_id == 2**63 - 1


def test_a_byte_order_mark_is_removed(touch, write):
    file = write("c.json", b'\xef\xbb\xbf{"images": [{"id": 1, "file_name": "1.jpg"}]}\r\n')
    assert len(coco.read_official(touch("i", "1.jpg"), file, "test")) == 1


FAULTS = {
    "a list": ([], "c.json: Expected `object`, got `array`; expected COCO captions"),
    "Karpathy's file": (
        {"images": [{"filename": "1.jpg", "imgid": 0, "sentences": []}], "dataset": "coco"},
        "c.json: images[0]: Object missing required field `id`; expected COCO captions",
    ),
    "an instances file": (
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]},
        "annotations[0]: Object missing required field `caption`; expected COCO captions: 'images' with id",
    ),
    "no list of images": ({"annotations": []}, "c.json: Object missing required field `images`; expected"),
    "annotations that are null": (
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": None},
        "annotations: Expected `array`, got `null`; expected",
    ),
    "items that are no objects": ({"images": [1], "annotations": []}, "images[0]: Expected `object`, got"),
    "an id in quotes": (
        {"images": [{"id": "1", "file_name": "1.jpg"}]},
        "images[0].id: Expected `int`, got `str`",
    ),
    "an id below zero": ({"images": [{"id": -1, "file_name": "1.jpg"}]}, "images[0].id: Expected `int` >= 0"),
    "an id beyond 64 bits": (
        {"images": [{"id": 2**63, "file_name": "1.jpg"}]},
        "images[0].id: Expected `int` <=",
    ),
    "a caption that is null": (
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": None}]},
        "annotations[0].caption: Expected `str`, got `null`",
    ),
    "no images": (document({}, []), "c.json: no images; expected at least one;"),
    "an image without captions": (document({1: "1.jpg"}, []), "c.json: image 1 (1.jpg) has no captions,"),
    "an image with an empty caption": (
        document({1: "1.jpg"}, [(1, " ")]),
        "image 1 (1.jpg) has no captions, or",
    ),
    "a caption of no image": (
        document({1: "1.jpg"}, [(1, "a"), (2, "b")]),
        "annotations[1] has image_id 2, which is not in 'images'; expected one that is; delete",
    ),
    "an image id twice": (
        {"images": [{"id": 1, "file_name": "1.jpg"}] * 2, "annotations": []},
        "images[1] repeats image id 1; expected each id once; delete one",
    ),
    "a path that leads out": (
        document({1: "a/../../1.jpg"}, [(1, "a")]),
        "image 1: image 'a/../../1.jpg'; expected a path below the folder of the images; write",
    ),
    "an absolute path": (
        document({1: "/1.jpg"}, [(1, "a")]),
        "image 1: image '/1.jpg'; expected a path below",
    ),
    "a name with a zero byte": (document({1: "a\0/1.jpg"}, [(1, "a")]), "image 'a\\x00/1.jpg'; expected"),
    "a file cut short": ('{"images": [{"id": 1,', "c.json: not JSON: Input data was truncated; expected"),
    "a file that is broken": ('{"images": [{"id": 1,}', "not JSON: JSON is malformed"),
    "brackets without end": ('{"info": ' + "[" * 100_000, "c.json: not JSON: nested too deeply"),
    "an empty file": (" \n", "c.json: not JSON: Input data was truncated; expected"),
    "a zip": (b"PK\x03\x04\xff", "c.json: not JSON: JSON is malformed: invalid character (byte 0); expected"),
    "a caption that is not UTF-8": (
        b'{"images": [{"id": 1, "file_name": "caf\xe9"}]}',
        "c.json: not JSON: 'utf-8' codec can't decode byte 0xe9",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_with(tmp_path, touch, write, fault):
    content, words = FAULTS[fault]
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        coco.read_official(touch("i", "1.jpg"), write("c.json", content), "val")
    assert str(refused.value).startswith(f"{tmp_path}/c.json: ")
    assert str(refused.value).count(";") >= 2
    assert "\n" not in str(refused.value)


def test_references_need_no_image_but_captions(write):
    content = document({1: "1.jpg", 2: "2.jpg"}, [(2, "a "), (1, "b"), (2, "c")])
    assert coco.read_references(write("c.json", content)) == {1: ["b"], 2: ["a ", "c"]}
    del content["annotations"]
    with pytest.raises(UserError, match=r"c.json: no list 'annotations'; expected COCO captions"):
        coco.read_references(write("c.json", content))


def test_a_record_with_five_captions_takes_half_a_kilobyte_plus_its_text(touch, write):
    # A million images with five captions each are to be read in 2 GB, of which the file itself takes a third.
    count, caption = 2000, "A dog runs over a field of grass."
    names = {n: f"{n:012}.jpg" for n in range(count)}
    file = write("c.json", document(names, [(n % count, caption) for n in range(5 * count)]))
    images = touch("i", *names.values())
    coco.read_official(images, file, "train")
    tracemalloc.start()
    records = coco.read_official(images, file, "train")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    letters = 5 * (len(caption) + 49)
    assert len(records) == count
    assert kept / count < letters + 512
    assert (peak - file.stat().st_size) / count < letters + 1200


# ---- Karpathy's lists


def name_2014(image_id, folder="val2014"):
    return f"COCO_{folder}_{image_id:012}.jpg"


def line(image_id, folder="val2014"):
    return f"{folder}/{name_2014(image_id, folder)} {image_id}"


@pytest.fixture
def coco_2014(touch, write):
    """Images 1 to 3 of train2014 and 4 to 9 of val2014; 4 is listed as val, 5 and 6 as test."""
    folders = {n: "train2014" if n < 4 else "val2014" for n in range(1, 10)}
    touch("coco", *(f"{folder}/{name_2014(n, folder)}" for n, folder in folders.items()))
    files = []
    for folder in ("train2014", "val2014"):
        ids = [n for n in folders if folders[n] == folder]
        content = document({n: name_2014(n, folder) for n in ids}, [(n, f"caption {n}") for n in ids])
        files.append(write(f"captions_{folder}.json", content))
    write("lists/karpathy_val_images.txt", f"{line(4)}\r\n")
    write("lists/karpathy_test_images.txt", f"{line(6)}\n{line(5)}\n\n")
    return files


def splits(records):
    found = {}
    for record in records:
        found.setdefault(record.split, []).append(record.image_id)
    return found


def test_an_image_in_no_list_is_of_train_and_restval_may_be_left_out(tmp_path, coco_2014):
    records = coco.read_karpathy_lists(tmp_path / "coco", coco_2014, tmp_path / "lists", "train")
    assert splits(records) == {"train": [1, 2, 3, 7, 8, 9], "val": [4], "test": [5, 6]}
    assert records[0] == Record(
        1, "train", ("caption 1",), f"{tmp_path}/coco/train2014", name_2014(1, "train2014")
    )
    dropped = coco.read_karpathy_lists(tmp_path / "coco", coco_2014, tmp_path / "lists", "drop")
    assert splits(dropped) == {"train": [1, 2, 3], "val": [4], "test": [5, 6]}


def test_with_a_list_of_train_images_in_no_list_are_left_out(tmp_path, coco_2014, write):
    write("lists/karpathy_train_images.txt", f"{line(1, 'train2014')}\n{line(9)}\n")
    records = coco.read_karpathy_lists(tmp_path / "coco", coco_2014, tmp_path / "lists", "train")
    assert splits(records) == {"train": [1, 9], "val": [4], "test": [5, 6]}
    dropped = coco.read_karpathy_lists(tmp_path / "coco", coco_2014, tmp_path / "lists", "drop")
    assert splits(dropped) == {"train": [1], "val": [4], "test": [5, 6]}


def test_only_images_of_a_split_need_captions_and_a_file(tmp_path, coco_2014, write):
    write("lists/karpathy_train_images.txt", f"{line(1, 'train2014')}\n")
    (tmp_path / "coco" / "val2014" / name_2014(9)).unlink()
    assert len(coco.read_karpathy_lists(tmp_path / "coco", coco_2014, tmp_path / "lists", "train")) == 4


LIST_FAULTS = {
    "an image in two lists": (
        {"val": line(4), "test": line(4)},
        "test_images.txt: line 1: image 4 is in the list of val too; expected it in one split, or training",
    ),
    "an image of no annotation": (
        {"val": line(4), "test": line(10)},
        "test_images.txt: line 1 names val2014/COCO_val2014_000000000010.jpg 10; expected an image of the",
    ),
    "the id of another image": (
        {"val": line(4), "test": f"\nval2014/{name_2014(5)} 6"},
        "line 2 names val2014/COCO_val2014_000000000005.jpg 6; expected an image of the annotations with its",
    ),
    "another folder": (
        {"val": line(4), "test": f"train2014/{name_2014(5)} 5"},
        "line 1 names train2014/COCO_val2014",
    ),
    "a line of another form": (
        {"val": line(4), "test": "val2014/1.jpg"},
        "line 1 is 'val2014/1.jpg'; expected val2014/COCO_val2014_000000391895.jpg 391895; fix it",
    ),
    "an empty list": (
        {"val": "", "test": line(5)},
        "val_images.txt: the file is empty; expected text; write or",
    ),
    "no list of test": ({"val": line(4)}, "test_images.txt: No such file or directory; expected"),
}


@pytest.mark.parametrize("fault", LIST_FAULTS)
def test_faulty_lists_are_refused_with(tmp_path, coco_2014, write, fault):
    lists, words = LIST_FAULTS[fault]
    for split, content in lists.items():
        write(f"other/karpathy_{split}_images.txt", content)
    with pytest.raises(UserError, match=re.escape(words)):
        coco.read_karpathy_lists(tmp_path / "coco", coco_2014, tmp_path / "other", "train")


def test_half_of_the_annotations_or_those_of_2017_are_refused(tmp_path, coco_2014, write):
    for half in (coco_2014[:1], coco_2014[1:], []):
        with pytest.raises(
            UserError, match=r"expected images of train2014 and of val2014 both; give captions_tr"
        ):
            coco.read_karpathy_lists(tmp_path / "coco", half, tmp_path / "lists", "train")
    with pytest.raises(
        UserError, match=r"image 4 is in another file too; expected it once; give captions_train"
    ):
        coco.read_karpathy_lists(tmp_path / "coco", [*coco_2014, coco_2014[1]], tmp_path / "lists", "train")
    for name in ("000000000012.jpg", name_2014(13)):
        other = write("captions_train2017.json", document({12: name}, [(12, "a")]))
        with pytest.raises(
            UserError, match=f"image 12 has the file name '{name}'; expected COCO 2014's, as in"
        ):
            coco.read_karpathy_lists(tmp_path / "coco", [*coco_2014, other], tmp_path / "lists", "train")


def test_the_folder_that_has_the_images_is_named(tmp_path, coco_2014):
    with pytest.raises(
        UserError, match=r"9 images .* of 9 missing; expected each .*; give the folder .*/coco$"
    ):
        coco.read_karpathy_lists(tmp_path / "coco" / "train2014", coco_2014, tmp_path / "lists", "train")
    for file in (tmp_path / "coco" / "train2014").iterdir():
        file.unlink()
    with pytest.raises(
        UserError, match=r"3 images .train2014/COCO_train2014_000000000001.jpg, .* of 9 missing"
    ):
        coco.read_karpathy_lists(tmp_path / "coco", coco_2014, tmp_path / "lists", "train")


# ---- the real data


def test_the_real_coco_sample_is_read_whole(real_data):
    root = real_data / "coco_sample"
    for split, images in [("train", 144), ("val", 60)]:
        records = coco.read_official(
            root / f"{split}2017", root / "annotations" / f"captions_{split}2017.json", split
        )
        assert len(records) == images
        assert sum(len(record.captions) for record in records) == 5 * images
        assert all(record.name == f"{record.image_id:012}.jpg" for record in records)


def test_the_real_file_of_coco_2014_gives_25010_captions(real_data, touch):
    captions = real_data / "coco_karpathy" / "captions_test5k.json"
    references = coco.read_references(captions)
    images = touch("i", *(name_2014(image_id) for image_id in references))
    records = coco.read_official(images, captions, "test")
    assert Counter(len(record.captions) for record in records) == {5: 4990, 6: 10}
    with pytest.raises(
        UserError, match=r"images\[0\]: Object missing required field `id`; expected COCO capti"
    ):
        coco.read_official(images, captions.with_name("dataset_coco_format_example.json"), "test")


def test_the_real_lists_divide_the_real_captions(real_data, touch, write):
    root = real_data / "coco_karpathy"
    paths = [
        path
        for split in ("val", "test")
        for path, _ in map(str.split, (root / f"karpathy_{split}_images.txt").read_text().splitlines())
    ]
    train = write("train.json", document({1: name_2014(1, "train2014")}, [(1, "a")]))
    images = touch("i", *paths, f"train2014/{name_2014(1, 'train2014')}")
    captions = [root / "captions_val5k.json", root / "captions_test5k.json", train]
    records = coco.read_karpathy_lists(images, captions, root, "drop")
    assert Counter(record.split for record in records) == {"train": 1, "val": 5000, "test": 5000}
    assert sum(len(record.captions) for record in records) == 1 + 2 * 25_010
    assert {Path(record.source).name for record in records} == {"train2014", "val2014"}
