"""The data sets themselves, from their files to verified shards, by the commands that a user gives."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from captionscale import cli
from captionscale.data.shards import Split
from captionscale.data.verification import verify


def pack(*arguments: object) -> None:
    cli.main(["pack", *map(str, arguments)])


def assert_packed(out: Path, split: str, files: dict[int, Path], captions: dict[int, list[str]]) -> None:
    """Compare a split with the source files, sample by sample."""
    packed = Split(out, split)
    assert packed.index["image_id"].tolist() == sorted(files)
    for item, image_id in enumerate(packed.index["image_id"].tolist()):
        assert packed.image(item) == files[image_id].read_bytes()
        assert packed.sample(item).file == files[image_id].name
        assert list(packed.captions(item)) == [text.strip() for text in captions[image_id]]


@pytest.mark.parametrize("layout", ["captions.txt", "Flickr8k.token.txt"])
def test_flickr8k(real_data: Path, tmp_path: Path, layout: str) -> None:
    data = real_data / "flickr8k"
    pack(
        *("flickr8k", "--images", data / "Images", "--captions", data / layout, "--splits", data),
        *("--out", tmp_path, "--expect", "train=6000", "--expect", "val=1000"),
    )
    assert verify(tmp_path, deep=True).problems == []
    captions = defaultdict(list)
    with (data / "captions.txt").open(newline="") as file:
        for row in csv.DictReader(file):
            captions[int(row["image"].split("_")[0])].append(row["caption"])
    for split, name in (("train", "trainImages"), ("val", "devImages")):
        names = (data / f"Flickr_8k.{name}.txt").read_text().split()
        files = {int(name.split("_")[0]): data / "Images" / name for name in names}
        assert_packed(tmp_path, split, files, captions)


def test_coco_2017(real_data: Path, tmp_path: Path) -> None:
    data = real_data / "coco_sample"
    for split in ("train", "val"):
        source = data / "annotations" / f"captions_{split}2017.json"
        pack(
            "coco",
            "--images",
            data / f"{split}2017",
            "--captions",
            source,
            "--split",
            split,
            "--out",
            tmp_path,
        )
        document = json.loads(source.read_text())
        files = {image["id"]: data / f"{split}2017" / image["file_name"] for image in document["images"]}
        captions = defaultdict(list)
        for annotation in document["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        assert_packed(tmp_path, split, files, captions)
    assert verify(tmp_path, deep=True).problems == []


def test_karpathys_layout(real_data: Path, tmp_path: Path) -> None:
    # Of these records there are no images here; drawn ones stand in for them.
    source = real_data / "coco_karpathy" / "dataset_coco_format_example.json"
    captions, files = defaultdict(dict), defaultdict(dict)
    for number, image in enumerate(json.loads(source.read_text())["images"]):
        path = tmp_path / "coco" / image["filepath"] / image["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), (40 * number, 100, 200)).save(path)
        split = "train" if image["split"] == "restval" else image["split"]
        files[split][image["cocoid"]] = path
        captions[split][image["cocoid"]] = [sentence["raw"] for sentence in image["sentences"]]
    out = tmp_path / "shards"
    pack("karpathy", "--images", tmp_path / "coco", "--captions", source, "--out", out)
    assert verify(out, deep=True).problems == []
    for split in ("train", "val", "test"):
        assert_packed(out, split, files[split], captions[split])


def test_a_sample_of_coco_is_not_taken_for_coco(real_data: Path, tmp_path: Path, capsys) -> None:
    data = real_data / "coco_sample"
    captions = data / "annotations" / "captions_val2017.json"
    with pytest.raises(SystemExit):
        pack(
            *("coco", "--images", data / "val2017", "--captions", captions, "--split", "val"),
            *("--out", tmp_path / "out", "--expect", "val=5000"),
        )
    assert "split 'val' has 60 images, expected 5,000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
