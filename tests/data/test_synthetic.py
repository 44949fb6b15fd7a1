import re
from itertools import chain
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from pycocotools.coco import COCO

from captionscale.data.drawing import COLORS, FLYING, TOYS
from captionscale.data.synthetic import NOUNS, SIDES, SIZES, WHERE, all_scenes, captions, write_coco
from captionscale.errors import UserError

COUNTS = {"train": 60, "val": 12, "test": 12}
SCENES = Random(1).sample(list(chain(*all_scenes())), 600)
KIND = {noun: kind for kind in TOYS for noun in NOUNS.get(kind, (kind,))}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coco")
    write_coco(out, counts=COUNTS, size=48)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


def test_the_official_reader_finds_every_image_and_its_five_captions(drawn: Path) -> None:
    seen = []
    for split, count in COUNTS.items():
        coco = COCO(drawn / "annotations" / f"captions_{split}2017.json")
        assert list(coco.dataset) == ["info", "licenses", "images", "annotations"]
        assert len(coco.imgs) == len(list((drawn / f"{split}2017").iterdir())) == count
        for image_id, entry in coco.imgs.items():
            assert entry["file_name"] == f"{image_id:012}.jpg"
            with Image.open(drawn / f"{split}2017" / entry["file_name"]) as image:
                assert image.size == (entry["width"], entry["height"]) == (48, 48)
            assert len(coco.getAnnIds(imgIds=[image_id])) == 5
        seen += [*coco.imgs, *(-number for number in coco.anns)]
    assert len(seen) == len(set(seen)) == 6 * sum(COUNTS.values())


def test_no_image_is_drawn_twice(drawn: Path) -> None:
    images = [data for name, data in contents(drawn).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images) == sum(COUNTS.values())
    scenes = list(chain(*all_scenes()))
    assert len(set(scenes)) == len(scenes)


def test_the_same_arguments_write_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    write_coco(tmp_path, counts=COUNTS, size=48)
    assert contents(tmp_path) == contents(drawn)


def test_another_seed_writes_other_images_and_captions(drawn: Path, tmp_path: Path) -> None:
    write_coco(tmp_path, counts=COUNTS, size=48, seed=1)
    assert not set(contents(tmp_path).values()) & set(contents(drawn).values())


def test_more_images_than_scenes_are_refused_with_the_limit(tmp_path: Path) -> None:
    limit = sum(map(len, all_scenes()))
    with pytest.raises(UserError, match=f"there are {limit} scenes"):
        write_coco(tmp_path, counts={"train": limit, "val": 1})
    assert not list(tmp_path.iterdir())


def test_fewer_than_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="-1 images requested in split 'val'"):
        write_coco(tmp_path / "out", counts={"train": 3, "val": -1})
    assert not list(tmp_path.iterdir())


def test_five_captions_differ_and_are_english_sentences() -> None:
    words = set()
    for scene in SCENES:
        said = captions(scene, Random(7))
        assert len(set(said)) == 5
        for caption in said:
            assert re.fullmatch(r"[A-Z][a-z ,]+[a-z]\.", caption)
            assert "  " not in caption
            assert all(re.match("[aeiou]", word) for word in re.findall(r"\b[Aa]n (\w+)", caption))
            assert not re.search(r"\b[Aa] [aeiou]", caption)
            words.update(re.findall(r"\w+", caption.lower()))
    assert len(words) < 120


def test_captions_say_nothing_that_is_not_in_the_scene() -> None:
    sizes = {word: size for size, words in SIZES.items() for word in words}
    for scene in SCENES:
        for caption in captions(scene, Random(3)):
            words = re.findall(r"\w+", caption.lower())
            assert {sizes[word] for word in words if word in sizes} <= {scene.size}
            named = re.findall(rf"(?:({'|'.join(COLORS)}) )?\b({'|'.join(KIND)})\b", caption)
            assert named
            assert len(re.findall("|".join(rf"\b{color}\b" for color in COLORS), caption)) <= len(named)
            for color, noun in named:
                assert any(toy.kind == KIND[noun] and color in ("", toy.color) for toy in scene.toys)
            places = [name for name, phrases in WHERE.items() for at in phrases if at in caption.lower()]
            assert set(places) <= {scene.setting}
            if len(scene.toys) == 1:
                assert all(side == scene.relation for side, at in SIDES.items() if at in caption)


def test_captions_describe_the_positions_of_the_toys() -> None:
    described = 0
    for scene in [scene for scene in SCENES if len(scene.toys) == 2]:
        first, last = (toy.kind for toy in scene.toys)
        assert scene.relation == "beside" or (first in FLYING and last not in FLYING)
        for caption in captions(scene, Random(5)):
            order = [KIND[word] for word in re.findall(r"\w+", caption) if word in KIND]
            relation = re.search(r"left|right of|with|above|over|below", caption)
            if relation:
                described += 1
                turned = relation[0] in ("right of", "with", "below")
                assert order == ([last, first] if turned else [first, last])
                assert (relation[0] in ("left", "right of")) == (scene.relation == "beside")
    assert described > len(SCENES)
