"""A page about a run in whatever state; opened as text, as a browser has no more to read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from captionscale.cli import main


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory) -> Path:
    """A tiny run of two epochs, not yet scored."""
    return shutil.copytree(trained.parent, tmp_path_factory.mktemp("report") / "copy") / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def _write(run: Path, *options: str | Path) -> str:
    out = run.parent / "page.html"
    main(["report", str(run), "--out", str(out), *map(str, options)])
    return out.read_text(encoding="utf-8")


def _receipt(run: Path, packed: Path, caption: str, name: Callable[[int], int | str] = int) -> None:
    """Give a run a receipt of its test split, as `score` does, of the metrics that are quick."""
    from captionscale.data.shards import Split
    from captionscale.score import score
    from captionscale.train.checkpoint import open_checkpoint

    saved, split = open_checkpoint(run), Split(packed, "test")
    receipt = score(
        {name(row["image_id"]): f"{caption} {number % 3}" for number, row in enumerate(split.index)},
        {name(image_id): references for image_id, references in split.references().items()},
        ["BLEU-4", "CIDEr-D"],
        provenance={"split": "test", "step": saved.train_state.step},
        hashes={"model": saved.sha256},
    )
    receipt.write(run / "scores" / "test" / "receipt.json")


def test_a_run_that_is_not_scored_reports_it_and_shows_what_exists(copy) -> None:
    page = _write(copy)
    assert f"captionscale score {copy} --split val" in page
    for title in ("Loss", "Learning rate", "Throughput", "CIDEr-D", "At random"):
        assert f">{title}<" in page
    assert "data:image/jpeg;base64," in page
    # Nothing is fetched, nothing is run.
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", re.sub(r"xlink:href|<\?xml[^>]*>", "", page))


def test_a_scored_run_shows_its_table_and_what_changed_against_another(copy, packed, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    _receipt(copy, packed, "a red ball")
    _receipt(other, packed, "a cat")
    page = _write(copy, "--against", other)
    assert "Not scored yet" not in page
    assert "Compared with other" in page
    assert "Their settings are the same" in page
    assert "Best, by CIDEr-D" in page
    assert "attention of the word" in page
    from captionscale.score import Receipt
    from captionscale.score.comparison import compare

    receipts = [Receipt.read(each / "scores" / "test" / "receipt.json") for each in (other, copy)]
    difference = {each.metric: each for each in compare(*receipts).differences}["BLEU-4"]
    assert f"<td>{100 * difference.difference:+.1f}</td>" in page
    assert "Difference: run minus other; won: images on which run scores higher" in page


def test_against_a_run_that_is_not_scored_names_the_command_that_scores_it(copy, packed, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    _receipt(copy, packed, "a red ball")
    page = _write(copy, "--against", other)
    assert (
        f"other is not scored, so scores cannot be compared: run captionscale score {other} --split test"
        in page
    )
    assert "have different references" not in page


def test_only_the_best_and_the_last_validation_are_scored_again_for_their_intervals(copy) -> None:
    # All of them took as long as scoring had in training.
    (copy / "validation" / "step-00000001.json").write_text("rubbish")
    with (copy / "log.jsonl").open("a") as log:
        log.write('{"step": 1, "scores": {"CIDEr-D": -1.0}}\n')
    page = _write(copy)
    assert "best of 3 is" in page
    assert "step-00000001" not in page
    assert "of the best and the last validation" in page


def test_a_receipt_whose_images_have_names_is_shown_without_them(copy, packed) -> None:
    # score --captions of images from elsewhere, with --out in the run's folder.
    _receipt(copy, packed, "a red ball", "photo-{}".format)
    page = _write(copy)
    assert "Best, by CIDEr-D" in page
    assert "attention of the word" not in page


def test_a_run_that_is_training_or_was_killed_has_a_page_of_its_log(copy) -> None:
    shutil.rmtree(copy / "checkpoints")
    shutil.rmtree(copy / "validation")
    log = (copy / "log.jsonl").read_text(encoding="utf-8")
    (copy / "log.jsonl").write_text(log[:-20], encoding="utf-8")
    page = _write(copy)
    assert "A run without a readable checkpoint" in page
    assert ">Loss<" in page


def test_without_its_shards_a_page_has_no_images_and_reports_why(copy, tmp_path) -> None:
    page = _write(copy, "--shards", tmp_path / "nowhere")
    assert "no manifest.json" in page
    assert "The shards were not found" in page
    assert "data:image/jpeg" not in page


def test_a_run_of_another_version_is_reported(copy) -> None:
    for path in copy.glob("checkpoints/*/state.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    page = _write(copy)
    assert "a checkpoint of format 99, written by captionscale" in page
    assert "damaged" not in page
    assert ">Loss<" in page


def test_what_a_receipt_or_config_holds_is_text_and_never_markup(copy, packed) -> None:
    _receipt(copy, packed, "<img src=x onerror=alert(1)>")
    assert "<img src=x" not in _write(copy)


@pytest.mark.parametrize(
    ("name", "out", "error"),
    [
        ("no run", "page.html", "no such folder, expected the --out of captionscale train; correct the path"),
        ("run/checkpoints", "page.html", "no checkpoint and no log.jsonl, expected the --out"),
        ("experiment.toml", "page.html", "is a file, expected the --out of captionscale train"),
        ("run", "page.txt", "expected .html"),
        ("run", "experiment.toml/page.html", "cannot be written"),
    ],
)
def test_a_folder_without_a_run_and_an_unwritable_page_are_refused(name, out, error, run, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["report", str(run.parent / name), "--out", str(run.parent / out)])
    assert caught.value.code == 1
    error_output = capsys.readouterr().err
    assert error in error_output
    assert "Traceback" not in error_output
