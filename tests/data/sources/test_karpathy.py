import re
from collections import Counter

import pytest

from captionscale.data.sources import flickr, karpathy
from captionscale.data.sources.record import Record
from captionscale.errors import UserError


def image(image_id, split, folder="val2014", captions=("A dog. ",)):
    return {
        "filepath": folder,
        "sentids": [*range(len(captions))],
        "filename": f"COCO_{folder}_{image_id:012}.jpg",
        "imgid": 0,
        "split": split,
        "sentences": [
            {"tokens": ["a", "dog"], "raw": raw, "imgid": 0, "sentid": n} for n, raw in enumerate(captions)
        ],
        "cocoid": image_id,
    }


def flickr_image(name, split, captions=("A dog .",)):
    return {
        "sentids": [0],
        "imgid": 0,
        "sentences": [{"tokens": ["a", "dog"], "raw": raw, "imgid": 0, "sentid": 0} for raw in captions],
        "split": split,
        "filename": name,
    }


def coco(*images):
    return {"images": [*images], "dataset": "coco"}


@pytest.fixture
def images(touch):
    names = [
        f"{folder}/COCO_{folder}_{n:012}.jpg" for folder in ("train2014", "val2014") for n in range(1, 6)
    ]
    return touch("coco", *names)


def test_coco_is_read_by_its_ids_and_restval_is_train_or_left_out(images, write):
    content = coco(
        image(4, "test"),
        image(3, "restval", captions=(" b ", "", "a")),
        image(2, "val"),
        image(5, "train", "train2014"),
    )
    file = write("dataset_coco.json", content)
    train, val, test = f"{images}/train2014", f"{images}/val2014", f"{images}/val2014"
    kept = [
        Record(5, "train", ("A dog.",), train, "COCO_train2014_000000000005.jpg"),
        Record(2, "val", ("A dog.",), val, "COCO_val2014_000000000002.jpg"),
        Record(4, "test", ("A dog.",), test, "COCO_val2014_000000000004.jpg"),
    ]
    restval = Record(3, "train", ("b", "a"), val, "COCO_val2014_000000000003.jpg")
    assert karpathy.read(images, file, "train") == [restval, *kept]
    assert karpathy.read(images, file, "drop") == kept


@pytest.mark.parametrize("dataset", ["flickr8k", "flickr30k"])
def test_flickr_is_read_by_the_numbers_of_its_files_as_from_its_own_captions(touch, write, dataset):
    content = {
        "images": [flickr_image("30_b.jpg", "val"), flickr_image("4_a.jpg", "train")],
        "dataset": dataset,
    }
    images = touch("i", "30_b.jpg", "4_a.jpg")
    records = karpathy.read(images, write("dataset.json", content), "train")
    assert records == [
        Record(4, "train", ("A dog .",), str(images), "4_a.jpg"),
        Record(30, "val", ("A dog .",), str(images), "30_b.jpg"),
    ]
    write("lists/train.txt", "4_a.jpg")
    write("lists/val.txt", "30_b.jpg")
    tokens = write("tokens", "30_b.jpg#0\tA dog .\n4_a.jpg#0\tA dog .\n")
    assert flickr.read(images, tokens, images.parent / "lists") == records


FAULTS = {
    "the official captions": (
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []},
        "images[0]: Object missing required field `filename`; expected Karpathy's layout: 'dataset', and",
    ),
    "no name of a data set": ({"images": []}, "d.json: Object missing required field `dataset`; expected"),
    "another data set": (
        {"images": [], "dataset": "x\ny"},
        "d.json: dataset: Invalid enum value 'x\\ny'; expected",
    ),
    "another split": (
        coco(image(1, "trian")),
        "d.json: images[0].split: Invalid enum value 'trian'; expected",
    ),
    "a COCO image without its id": (
        {"images": [flickr_image("1.jpg", "train")], "dataset": "coco"},
        "d.json: images[0] has no cocoid; expected Karpathy's layout",
    ),
    "a Flickr image without a number": (
        {"images": [flickr_image("dog.jpg", "train")], "dataset": "flickr8k"},
        "d.json: images[0]: image dog.jpg has no number; expected its own number",
    ),
    "an image id twice": (
        coco(image(1, "val"), image(1, "train")),
        "images[1] repeats image id 1; expected each id",
    ),
    "two Flickr names with one number": (
        {"images": [flickr_image("1_a.jpg", "train"), flickr_image("1_b.jpg", "val")], "dataset": "flickr8k"},
        "images[1] repeats image id 1; expected each id once",
    ),
    "an image without captions": (
        coco(image(1, "val", captions=(" ",))),
        "d.json: image 1 (COCO_val2014_000000000001.jpg) has no captions, or only empty ones;",
    ),
    "a path that leads out": (
        coco(image(1, "val", "../val2014")),
        "images[0]: image '../val2014/COCO_../val",
    ),
    "no images": (coco(), "d.json: no images; expected at least one;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_with(tmp_path, images, write, fault):
    content, words = FAULTS[fault]
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        karpathy.read(images, write("d.json", content), "train")
    assert str(refused.value).startswith(f"{tmp_path}/d.json: ")
    assert "\n" not in str(refused.value)


def test_an_image_id_twice_is_refused_even_if_one_of_them_is_left_out(images, write):
    for both in ((image(1, "restval"), image(1, "val")), (image(1, "val"), image(1, "restval"))):
        with pytest.raises(UserError, match=r"images\[1\] repeats image id 1"):
            karpathy.read(images, write("d.json", coco(*both)), "drop")


def test_a_folder_too_deep_or_not_deep_enough_is_reported(images, write):
    file = write("d.json", coco(image(1, "val")))
    with pytest.raises(
        UserError, match=f"1 image .val2014/COCO_.* of 1 missing; .*; give the folder {images}$"
    ):
        karpathy.read(images / "val2014", file, "train")
    with pytest.raises(UserError, match=f"of 1 missing; .*; give the folder {images}$"):
        karpathy.read(images.parent, file, "train")


def test_the_true_layout_of_coco_is_read(real_data, touch):
    file = real_data / "coco_karpathy" / "dataset_coco_format_example.json"
    images = touch(
        "coco",
        *(f"val2014/COCO_val2014_{n:012}.jpg" for n in (391895, 522418, 184613)),
    )
    (images / "train2014").mkdir()
    with pytest.raises(
        UserError, match=r"2 images \(train2014/COCO_train2014_\d{12}.jpg, train2014/C.* of 5 mi"
    ) as e:
        karpathy.read(images, file, "train")
    for name in re.findall(r"train2014/\w+\.jpg", str(e.value)):
        (images / name).touch()
    records = karpathy.read(images, file, "train")
    assert Counter(record.split for record in records) == {"train": 3, "val": 1, "test": 1}
    assert records[-1].captions[0] == "A man with a red helmet on a small moped on a dirt road."
    assert len(karpathy.read(images, file, "drop")) == 4
