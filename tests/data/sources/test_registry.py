import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import source_contract
from PIL import Image

from captionscale.cli import main
from captionscale.data.sources.registry import SOURCES


def images(folder: Path, *names: str) -> str:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (60 * shade, 0, 0)).save(folder / name, "JPEG")
    return str(folder)


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def coco(folder: Path) -> list[str]:
    document = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 2, "caption": " a dog "}, {"image_id": 7, "caption": "a cat"}],
    }
    captions = write(folder / "captions.json", document)
    return ["--images", images(folder / "i", "2.jpg", "7.jpg"), "--captions", captions, "--split", "val"]


def karpathy(folder: Path) -> list[str]:
    listed = [
        {"filename": f"{key}.jpg", "cocoid": key, "split": split, "sentences": [{"raw": "a dog"}]}
        for key, split in enumerate(("test", "restval", "train", "val"))
    ]
    captions = write(folder / "dataset_coco.json", {"dataset": "coco", "images": listed})
    names = [each["filename"] for each in listed]
    return ["--images", images(folder / "i", *names), "--captions", captions, "--restval", "drop"]


def flickr(folder: Path) -> list[str]:
    captions = write(folder / "captions.txt", "image,caption\n10_a.jpg,a dog\n9_b.jpg,a cat\n")
    return ["--images", images(folder / "i", "10_a.jpg", "9_b.jpg"), "--captions", captions]


def table(folder: Path) -> list[str]:
    captions = write(folder / "t.csv", "image,caption,split\nb.jpg,a dog,val\na.jpg,a cat,\n")
    return ["--images", images(folder / "i", "a.jpg", "b.jpg"), "--captions", captions]


def texts(folder: Path) -> list[str]:
    names = images(folder / "i", "a.jpg", "b/c.jpg")
    write(folder / "i" / "a.txt", "a dog\n\na cat\n")
    write(folder / "i" / "b" / "c.txt", "a bus")
    return ["--images", names, "--split", "test"]


def webdataset(folder: Path) -> list[str]:
    texts(folder)
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "i", arcname=".")
    return ["--tars", str(folder / "a.tar")]


EXAMPLES: dict[str, Callable[[Path], list[str]]] = {
    "coco": coco,
    "karpathy": karpathy,
    "flickr8k": flickr,
    "flickr30k": flickr,
    "table": table,
    "folder": texts,
    "webdataset": webdataset,
}
"""For each source a function that writes a small data set and returns the arguments of `pack`."""


@pytest.mark.parametrize("name", SOURCES)
def test_each_source_fulfills_the_contract(name: str, tmp_path: Path) -> None:
    source_contract.check(name, EXAMPLES[name](tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("imagenet", "invalid choice: 'imagenet' (choose from 'coco',"),
        ("no_such_module:Class", "no_such_module:Class: cannot be imported (ModuleNotFoundError"),
        ("json:JSONDecoder", "derived from captionscale.data.sources.source.Source; see docs/extending.md"),
    ],
)
def test_an_unknown_source_is_named(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pack", name, "--out", "x"])
    assert says in capsys.readouterr().err


def test_expected_numbers_are_compared_where_no_file_lists_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["pack", "folder", *texts(tmp_path), "--out", str(tmp_path / "o"), "--expect", "test=3"])
    assert "pack folder: split 'test' has 2 images, expected 3" in capsys.readouterr().err
