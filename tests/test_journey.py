"""From raw files to scored captions, by the commands that a user gives."""

import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from experiment import logged_losses, tiny_config

from captionscale.cli import main


def _say(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def _refuse(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, trained by the command line."""
    folder = tmp_path_factory.mktemp("journey")
    tiny_config(folder, packed, "train.epochs=1")
    main(["train", str(folder / "experiment.toml"), "--out", str(folder / "run")])
    return folder / "run"


def test_coco_goes_from_raw_files_to_verified_shards(
    synthetic_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    for split, images in (("train", 48), ("val", 8)):
        captions = synthetic_coco / "annotations" / f"captions_{split}2017.json"
        said = _say(
            capsys, "pack", "coco", "--images", synthetic_coco / f"{split}2017", "--captions", captions,
            "--split", split, "--out", out,
        )  # fmt: skip
        assert said == f"{out}: {split}: {images} images, {5 * images} captions\n"
    assert _say(capsys, "verify", out) == f"{out}: as packed: images: train 48, val 8\n"
    image = next(iter((synthetic_coco / "val2017").iterdir()))
    said = _say(capsys, "show", out, str(int(image.stem)), "--out", tmp_path / "saved.jpg")
    assert f"{image.name}  split val" in said
    assert len(said.splitlines()) == 2 + 5
    assert (tmp_path / "saved.jpg").read_bytes() == image.read_bytes()


@pytest.mark.usefixtures("warm_meteor")
def test_a_run_is_scored_with_a_receipt_and_captions_for_every_image(
    run: Path, synthetic_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from captionscale.score import Receipt

    said = _say(capsys, "score", run, "--split", "test", "--beam", "2")
    _say(capsys, "score", run, "--split", "test", "--beam", "2", "--out", tmp_path / "again.json")
    [folder] = (run / "scores").glob("*/")
    # Captions alone, without the run that wrote them, have the same scores.
    by_file = _say(
        capsys, "score", "--captions", folder / "captions.json",
        "--references", synthetic_coco / "annotations" / "captions_test2017.json",
        "--out", tmp_path / "other.json",
    )  # fmt: skip
    names = [line.split()[0] for line in said.splitlines()[:7]]
    assert names == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D"]
    assert said.splitlines()[:7] == by_file.splitlines()[:7]
    receipt, again = Receipt.read(folder / "receipt.json"), Receipt.read(tmp_path / "again.json")
    assert again.sha256 == receipt.sha256
    assert receipt.counts["images"] == len(receipt.images.ids) == 8
    assert receipt.counts["references"] == 40
    assert receipt.provenance["split"] == "test"
    assert receipt.provenance["search"]["beam"] == 2
    assert receipt.diagnostics["captions"]["novel"] is not None
    assert "|beam 2|length-penalty 0.7|end not rewarded" in receipt.signature
    history = [json.loads(line) for line in (run / "scores" / "history.jsonl").read_text().splitlines()]
    assert [(line["split"], line["scores"]) for line in history] == [("test", receipt.scores)] * 2
    other = Receipt.read(tmp_path / "other.json")
    assert (other.scores, other.intervals) == (receipt.scores, receipt.intervals)
    assert other.metric_signature == receipt.metric_signature
    assert "p     won" in _say(capsys, "compare", run, tmp_path / "other.json", "--limit", "1")

    from pycocotools.coco import COCO

    results = json.loads((folder / "captions.json").read_text())
    references = COCO()
    references.dataset = {"images": [{"id": result["image_id"]} for result in results], "annotations": []}
    references.createIndex()
    assert sorted(references.loadRes(results).getImgIds()) == sorted(references.getImgIds())


def test_images_are_captioned_one_line_each(
    run: Path, synthetic_coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((synthetic_coco / "test2017").iterdir())[:3]
    lines = _say(capsys, "caption", run, *images, "--beam", "3").splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(image) for image in images]


def test_ranks_without_work_wait_for_nobody_and_change_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    main(["caption", str(run), "--split", "test", "--out", str(alone)])
    # One batch of eight images: two of three processes have none.
    main(["launch", "--processes", "3", "--", "caption", str(run), "--split", "test", "--out", str(together)])
    assert together.read_bytes() == alone.read_bytes()


def test_a_split_without_captions_is_captioned_but_neither_scored_nor_trained_on(
    run: Path, synthetic_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "results.json"
    said = _say(
        capsys, "pack", "folder", "--images", synthetic_coco / "test2017", "--split", "test", "--out", shards
    )
    assert said == f"{shards}: test: 8 images, 0 captions\n"
    said = _say(capsys, "caption", run, "--split", "test", "--shards", shards, "--out", out)
    assert said == f"{out}: 8 captions, in COCO's results format\n"
    # Counted in the order of the names, which are the data set's ids.
    by_number = {line["image_id"]: line["caption"] for line in json.loads(out.read_text())}
    images = sorted((synthetic_coco / "test2017").iterdir())
    lines = _say(capsys, "caption", run, *images).splitlines()
    assert [line.split("\t")[1] for line in lines] == [by_number[number] for number in range(1, 9)]
    # With the captions of the other images, they are what a leaderboard takes.
    listed, others = tmp_path / "nocaps_val_image_info.json", tmp_path / "others.json"
    listed.write_text(json.dumps({"images": [{"id": number} for number in range(4500)]}))
    rest = [{"image_id": number, "caption": "a dog"} for number in range(4500) if number not in by_number]
    others.write_text(json.dumps(rest))
    said = _say(
        capsys, "leaderboard", "--eval-set", "nocaps-val", "--captions", out, others,
        "--image-info", listed, "--name", "tiny", "--out", tmp_path / "upload",
    )  # fmt: skip
    assert said.endswith(f"upload {tmp_path / 'upload' / 'nocaps_val_tiny_results.json'}\n")
    expected = "8 of 8 images of split 'test' have no captions; expected them to score against"
    assert expected in _refuse(capsys, "score", run, "--split", "test", "--shards", shards)
    tiny_config(tmp_path, shards, "data.train_split=test", "data.val_split=test")
    said = _refuse(capsys, "train", tmp_path / "experiment.toml", "--out", tmp_path / "run")
    assert "have no captions; expected them to train; pack the data set with its captions" in said
    assert "expected either RUN IMAGE ..." in _refuse(capsys, "caption", run, images[0], "--split", "test")
    assert "expected either RUN IMAGE ..." in _refuse(capsys, "caption", run)


@pytest.fixture
def url(packed: Path) -> Iterator[str]:
    """The shards behind a web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(packed))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_behind_a_url_are_verified_shown_and_trained_on_as_in_their_folder(
    run: Path, packed: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CAPTIONSCALE_CACHE", str(tmp_path / "cache"))
    counts = "as packed: images: train 48, val 8, test 8\n"
    assert _say(capsys, "verify", url) == f"{url}: {counts}"
    assert _say(capsys, "show", url, "3") == _say(capsys, "show", packed, "3")
    by_url, by_folder = _say(capsys, "stats", url), _say(capsys, "stats", packed)
    assert by_url.replace(url, str(packed)) == by_folder
    # The cache holds two of three shards: shards are evicted while they are read.
    largest = max(path.stat().st_size for path in packed.glob("*.tar"))
    tiny_config(tmp_path, packed, "train.epochs=1")
    changes = (
        f"data.shards={url}",
        f"data.cache={tmp_path / 'small'}",
        f"data.cache_gb={2.2 * largest / 1e9}",
    )
    options = [word for change in changes for word in ("--set", change)]
    main(["train", str(tmp_path / "experiment.toml"), "--out", str(tmp_path / "run"), *options])
    assert logged_losses(tmp_path / "run") == logged_losses(run)
    assert 0 < len(list((tmp_path / "small").glob("*.tar"))) <= 2


def test_the_config_that_is_printed_is_the_config_that_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert "attention" in _say(capsys, "config").split()
    assert "lr = 0.125\n" in _say(capsys, "config", "attention", "--set", "train.lr=0.125")


def test_bad_input_is_told_in_one_line(
    run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    assert "not a readable image" in _refuse(capsys, "caption", run, text)
    assert "No such file or directory, expected" in _refuse(capsys, "caption", run, tmp_path / "none.jpg")
    assert "no checkpoint, so no run" in _refuse(capsys, "caption", tmp_path, text)
    assert "no split 'vla'; did you mean 'val'?" in _refuse(capsys, "score", run, "--split", "vla")
    assert "no --split" in _refuse(capsys, "score", run)
    assert "expected either RUN" in _refuse(capsys, "score")
    assert "no image 4242 in any split" in _refuse(capsys, "show", packed, "4242")
    assert "run captionscale pack first" in _refuse(capsys, "verify", tmp_path)
    assert "did you mean 'attention'?" in _refuse(capsys, "config", "atention")
    assert "check the path" in _refuse(capsys, "train", "attention", "--out", "/proc/run")
    results = tmp_path / "results.json"
    results.write_text('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]')
    references = tmp_path / "references.json"
    references.write_text(
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}'
    )
    said = _refuse(capsys, "score", "--captions", results, "--references", references)
    assert "more than one caption" in said
    results.write_text('[{"image_id": 1, "caption": null}]')
    said = _refuse(capsys, "score", "--captions", results, "--references", references)
    assert "line 0 of the list is {'image_id': 1, 'caption': None}" in said
    results.write_text("{}[")
    said = _refuse(capsys, "score", "--captions", results, "--references", references)
    assert "no COCO results" in said


@pytest.mark.parametrize(("told", "found"), [("", "passive"), ("active", "active")])
def test_threads_sleep_while_they_wait_unless_one_says_otherwise(told, found, monkeypatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", told)
    if not told:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    main(["config"])
    assert os.environ["OMP_WAIT_POLICY"] == found
