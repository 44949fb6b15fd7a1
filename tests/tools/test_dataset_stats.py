import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.filesize import decimal

from captionscale import progress
from captionscale.cli import main
from captionscale.data import manifest
from captionscale.data.packing import PackOptions, pack
from captionscale.data.sources import coco
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.tools.dataset_stats import print_stats
from captionscale.vocab import split_words

DATA = Path(__file__).parents[2].parent / "shared" / "data"

Pack = Callable[..., Path]


@pytest.fixture
def packs(tmp_path: Path) -> Pack:
    """Add splits to one folder; an image is its size (0: broken) and its captions, ids count from 1."""
    ids = itertools.count(1)

    def packs(**splits: list[tuple[tuple[int, int], tuple[str, ...]]]) -> Path:
        records = []
        for split, samples in splits.items():
            for size, captions in samples:
                image_id = next(ids)
                if min(size):
                    Image.new("L", size).save(tmp_path / f"{image_id}.png")
                else:
                    (tmp_path / f"{image_id}.png").write_bytes(b"no image")
                records.append(Record(image_id, split, captions, str(tmp_path), f"{image_id}.png"))
        out = tmp_path / "shards"
        pack(records, out, sources=[], options=PackOptions(images_per_shard=3, max_rejected=0.5))
        return out

    return packs


@pytest.fixture
def small(packs: Pack) -> Path:
    """Shards whose every number can be counted by hand; one image of train is broken."""
    return packs(
        train=[
            ((100, 50), ("A dog runs.", "dog " * 20)),
            ((301, 301), ("a cat",)),
            ((0, 0), ("never read",)),
            ((224, 400), ("A dog!", "dog " * 21)),
            ((640, 480), ()),
        ],
        val=[((500, 224), ("a Tuk-tuk, a tuk-tuk and a cat runs",))],
        test=[((700, 500), ())],
    )


def table(page: str) -> dict[str, list[str]]:
    """Return the columns' cells by their label; that of the names is empty."""
    lines = page.split("\n\n")[1].splitlines()
    return {label: cells for label, *cells in (re.split(r"\s{3,}", line) for line in lines)}


def test_the_numbers_are_those_counted_by_hand(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_stats(small, min_count=2)
    page = capsys.readouterr().out
    sizes = [
        sum(path.stat().st_size for path in small.glob(f"{name}-*.tar")) for name in ("train", "val", "test")
    ]
    assert table(page) == {
        "": ["train", "val", "test"],
        "images": ["4", "1", "1"],
        "rejected": ["1", "0", "0"],
        "shards": ["2", "1", "1"],
        "size": [decimal(size) for size in sizes],
        "width: min / median / max": ["100 / 262.5 / 640", "500 / 500 / 500", "700 / 700 / 700"],
        "height: min / median / max": ["50 / 350.5 / 480", "224 / 224 / 224", "500 / 500 / 500"],
        "portrait / landscape / square": ["25% / 50% / 25%", "0% / 100% / 0%", "0% / 100% / 0%"],
        "shorter side below 224": ["25.0%", "0.0%", "0.0%"],
        "captions": ["5", "1", "0"],
        "of an image: min / mean / max": ["0 / 1.25 / 2", "1 / 1.00 / 1", "0 / 0.00 / 0"],
        # Train's captions have 3, 20, 2, 2 and 21 words, which are 43 dog, 3 a, 1 runs and 1 cat.
        "words of a caption: mean": ["9.60", "8.00", "-"],
        "median / 95 % / max": ["3 / 21 / 21", "8 / 8 / 8", "-"],
        "captions above 20 words": ["20.0%", "0.0%", "-"],
        "words in the vocabulary": ["95.8%", "37.5%", "-"],
    }
    assert page.startswith(f"{small}: images stored as: original\n\n")
    assert page.split("\n\n")[2] == (
        "vocabulary of train: 4 words, 2 of them at least 2 times\n"
        "unknown words of val: tuk-tuk 2, and 1, cat 1, runs 1\n"
        "smallest images of train: 100 x 50 (image 1), 224 x 400 (image 4), 301 x 301 (image 2)\n"
        "smallest images of val: 500 x 224 (image 6)\n"
        "smallest images of test: 700 x 500 (image 7)\n"
        "note: no captions in test: these splits can be captioned, but not used for training or scoring\n"
        "note: many images of train have a side below 224 pixels, the default of data.image_size;"
        " they will be enlarged\n"
    )


def test_json_has_the_numbers_of_the_table(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["stats", str(small), "--min-count", "2", "--json"])
    stats = json.loads(capsys.readouterr().out)
    assert (stats["shards"], stats["stored"]) == (str(small), "original")
    assert stats["vocabulary"] == {"split": "train", "words": 4, "kept": 2}
    train, val, test = stats["splits"].values()
    assert list(stats["splits"]) == ["train", "val", "test"]
    assert train["size_bytes"] == sum(path.stat().st_size for path in small.glob("train-*.tar"))
    assert train["height"] == {"min": 50, "mean": 307.75, "median": 350.5, "p95": 480, "max": 480}
    assert train["caption_words"] == {"min": 2, "mean": 9.6, "median": 3, "p95": 21, "max": 21}
    assert (train["images"], train["rejected"], train["shards"], train["captions"]) == (4, 1, 2, 5)
    assert (train["portrait"], train["landscape"], train["square"]) == (0.25, 0.5, 0.25)
    assert (train["below_image_size"], train["above_max_words"]) == (0.25, 0.2)
    assert train["smallest_images"][0] == {"image_id": 1, "width": 100, "height": 50}
    assert val["vocabulary_coverage"] == 0.375
    assert val["unknown_words"] == {"tuk-tuk": 2, "and": 1, "cat": 1, "runs": 1}
    assert not {"caption_words", "vocabulary_coverage"} & test.keys()


def test_columns_are_aligned(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_stats(small, min_count=2)
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) <= 100


def test_a_vocabulary_covers_the_captions_it_is_of(
    packed: Path, synthetic_coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["stats", str(packed), "--min-count", "1"])
    page = capsys.readouterr().out
    assert table(page)["words in the vocabulary"][0] == "100.0%"
    texts = coco.read_references(synthetic_coco / "annotations" / "captions_train2017.json").values()
    words = {word for captions in texts for caption in captions for word in split_words(caption)}
    assert f"vocabulary of train: {len(words):,} words, {len(words):,} of them at least 1 times\n" in page


def test_a_word_of_the_minimum_count_is_kept(packs: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    shards = packs(train=[((300, 300), ("dog dog dog cat cat",))], val=[((300, 301), ("cat cat",))])
    for min_count, kept, train, val in ((2, 2, "100.0%", "100.0%"), (3, 1, "60.0%", "0.0%")):
        print_stats(shards, min_count=min_count)
        page = capsys.readouterr().out
        assert f"2 words, {kept} of them at least {min_count} times" in page
        assert table(page)["words in the vocabulary"] == [train, val]


def test_without_train_the_first_split_with_words_gives_the_vocabulary(
    packs: Pack, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ((300, 300), ("a dog",))
    shards = packs(blank=[((300, 300), ())], dots=[((300, 300), ("...",))], night=[some], zoo=[some])
    print_stats(shards, min_count=1)
    page = capsys.readouterr().out
    assert "vocabulary of night: 2 words" in page
    assert "unknown words of zoo: none" in page
    assert "unknown words of dots" not in page
    assert table(page)["median / 95 % / max"] == ["-", "0 / 0 / 0", "2 / 2 / 2", "2 / 2 / 2"]
    assert table(page)["words in the vocabulary"] == ["-", "-", "100.0%", "100.0%"]


def test_train_gives_the_vocabulary_wherever_it_is_listed(
    packs: Pack, capsys: pytest.CaptureFixture[str]
) -> None:
    packs(early=[((300, 300), ("a dog",))])
    print_stats(packs(train=[((300, 300), ("a cat",))]), min_count=1)
    page = capsys.readouterr().out
    assert table(page)[""] == ["early", "train"]
    assert table(page)["words in the vocabulary"] == ["50.0%", "100.0%"]
    assert "unknown words of early: dog 1\n" in page


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
@pytest.mark.parametrize("min_count", [1, 2, 99])
def test_any_captions_can_be_drawn(packs: Pack, tmp_path: Path, ending: str, min_count: int) -> None:
    one_word = packs(train=[((1, 1), ("dog",))], val=[((9000, 2), ("cat " * 3000, "Größe 日本"))])
    print_stats(one_word, min_count=min_count, plot=tmp_path / f"it.{ending}")
    assert (tmp_path / f"it.{ending}").stat().st_size > 5000


def test_without_captions_the_images_are_counted_and_drawn(
    packs: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = packs(test=[((300, 300), ()), ((10, 30), ())])
    print_stats(shards, min_count=5, plot=tmp_path / "it.svg")
    printed = capsys.readouterr()
    assert "note: no captions in test" in printed.out
    assert "vocabulary" not in printed.out
    assert printed.err == f"drawn: {tmp_path / 'it.svg'}\n"
    drawn = (tmp_path / "it.svg").read_text()
    assert "<!-- width in pixels -->" in drawn
    assert 'id="axes_2"' not in drawn


def test_the_suffix_sets_the_format_of_the_figure(small: Path, tmp_path: Path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("b.PDF", b"%PDF"), ("c d.svg", b"<?xml")):
        print_stats(small, min_count=2, plot=tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    drawn = (tmp_path / "c d.svg").read_text()
    for text in ("train", "val", "data.max_words = 20", "2 times: 2 of 4 words", "data.image_size = 224"):
        assert f"<!-- {text} -->" in drawn
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "png", "plot.png.gz"])
def test_another_format_is_refused_before_anything_is_counted(
    small: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=rf"{name}: ends in '.*', expected \.png or \.pdf or \.svg; rename it"
    ):
        print_stats(small, min_count=2, plot=tmp_path / name)
    assert capsys.readouterr().out == ""


def test_a_figure_that_cannot_be_written_does_not_suppress_the_table(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    for plot in (tmp_path / "nowhere" / "it.png", tmp_path / "folder.png"):
        with pytest.raises(UserError, match=rf"{plot}: cannot be written \(.*\), expected a writable folder"):
            print_stats(small, min_count=2, plot=plot)
        assert "vocabulary of train" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.usefixtures("started")
def test_matplotlib_is_imported_only_for_a_figure(small: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from captionscale.tools.dataset_stats import print_stats\n"
        f"print_stats(Path({str(small)!r}), min_count=2)\n"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)\n"
        f"print_stats(Path({str(small)!r}), min_count=2, plot=Path({str(tmp_path / 'it.png')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    # Regression: a traceback when a notebook had started the command.
    env = os.environ | {"MPLBACKEND": "module://of_a_notebook"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_progress_is_shown_for_long_tasks_only_and_does_not_change_the_output(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_stats(small, min_count=2)
    quick = capsys.readouterr()
    assert quick.err == ""
    monkeypatch.setattr(progress, "SHORT_S", 0.0)
    print_stats(small, min_count=2)
    slow = capsys.readouterr()
    # Images without captions are not read.
    assert slow.err == "reading train 3/3  0 s left\nreading val 1/1  0 s left\n"
    assert slow.out == quick.out


def test_a_manifest_without_splits_is_refused(tmp_path: Path) -> None:
    empty = manifest.Manifest(manifest.FORMAT, manifest.Images(), {})
    (tmp_path / manifest.MANIFEST).write_bytes(empty.dumps())
    with pytest.raises(UserError, match=rf"{manifest.MANIFEST}: no splits, expected at least one; "):
        print_stats(tmp_path, min_count=5)


def test_real_coco_images_have_the_sizes_of_the_annotations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = DATA / "coco_sample"
    if not sample.is_dir():
        pytest.skip("needs ../shared/data next to the checkout")
    captions = sample / "annotations" / "captions_val2017.json"
    records = coco.read_official(sample / "val2017", captions, "val")
    pack(records, tmp_path / "shards", sources=[captions], options=PackOptions(full_decode=False))
    print_stats(tmp_path / "shards", min_count=5)
    page = table(capsys.readouterr().out)
    document = json.loads(captions.read_text())
    for side in ("width", "height"):
        sizes = sorted(image[side] for image in document["images"])
        middle = (sizes[29] + sizes[30]) / 2
        assert page[f"{side}: min / median / max"] == [f"{sizes[0]} / {middle:g} / {sizes[-1]}"]
    assert page["captions"] == [f"{len(document['annotations']):,}"]
