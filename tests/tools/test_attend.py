"""Attention figures of a run that the command line trained."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from experiment import tiny_config
from PIL import Image

from captionscale.cli import main


def _output_of(capsys, *arguments) -> str:
    main([str(each) for each in arguments])
    return capsys.readouterr().out


def _error_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(each) for each in arguments])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory) -> Path:
    """A tiny run."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("attend") / "run")


@pytest.fixture
def images(synthetic_coco: Path) -> list[Path]:
    return sorted((synthetic_coco / "test2017").iterdir())[:2]


def test_a_figure_shows_the_caption_of_the_command_caption(run, images, tmp_path, capsys) -> None:
    output = _output_of(capsys, "attend", run, *images, "--out", tmp_path / "out", "--beam", "3")
    written = [line.split("\t") for line in output.splitlines()]
    captions = _output_of(capsys, "caption", run, *images, "--beam", "3").splitlines()
    assert [caption for _, caption in written] == [line.split("\t")[1] for line in captions]
    for path, _ in written:
        with Image.open(path) as figure:
            assert figure.width > 500


def test_two_images_of_one_name_have_two_figures(run, images, tmp_path, capsys) -> None:
    other = tmp_path / "other" / images[0].name
    other.parent.mkdir()
    other.write_bytes(images[1].read_bytes())
    output = _output_of(capsys, "attend", run, images[0], other, "--out", tmp_path / "out")
    paths = [Path(line.split("\t")[0]) for line in output.splitlines()]
    assert len(set(paths)) == 2
    assert all(path.is_file() for path in paths)


def test_a_split_becomes_pages_of_ten_images_up_to_the_limit(run, tmp_path, capsys) -> None:
    main(["attend", str(run), "--split", "train", "--limit", "12", "--out", str(tmp_path), "--beam", "1"])
    output = capsys.readouterr()
    assert "12 of 48 images of train on 2 pages\n" in output.err
    pages = [Path(line) for line in output.out.splitlines()]
    assert [page.name for page in pages] == ["train-001.png", "train-002.png"]
    heights = []
    for page in pages:
        with Image.open(page) as figure:
            heights.append(figure.height)
    assert heights[1] < heights[0] / 2, "two rows after ten"
    assert "expected --split with it" in _error_of(
        capsys, "attend", run, "photo.jpg", "--limit", "3", "--out", tmp_path
    )


def test_the_map_of_each_word_sums_to_one_over_the_grid(run, images) -> None:
    from captionscale.tools.captioner_api import CaptionPipeline
    from captionscale.tools.ensemble import open_ensemble

    for stride in (16, 32):
        pipeline = CaptionPipeline(open_ensemble(run, (), checkpoint="best", overrides=["search.beam=2"]))
        size = pipeline.ensemble.config.data.image_size
        if stride == 32:
            from captionscale.config_model import TorchvisionConfig
            from captionscale.model.captioner import Captioner

            coarser = TorchvisionConfig(name="resnet18", weights="none")
            model = pipeline.ensemble.config.model.model_copy(update={"encoder": coarser})
            pipeline.captioner = Captioner(model, len(pipeline.vocabulary)).eval()
        views = [pipeline.view(image) for image in images]
        for each in pipeline.generate_best(views, pipeline.generation_request(), range(len(views))):
            assert len(each.words) == len(each.probabilities) == len(each.attention_maps or ())
            assert all(0 < probability <= 1 for probability in each.probabilities)
            for weights in each.attention_maps or ():
                assert weights.shape == (size // stride, size // stride)
                assert weights.sum() == pytest.approx(1, abs=1e-5)


def test_the_overlay_is_the_right_way_up() -> None:
    from captionscale.tools.caption_result import overlay

    weights = np.zeros((2, 3), np.float32)
    weights[0, 2] = 1
    shown = np.asarray(overlay(Image.new("RGB", (90, 60), "grey"), weights, 1.0)).astype(int)
    yellow = shown[:, :, 0] - shown[:, :, 2]
    assert np.unravel_index(yellow.argmax(), yellow.shape)[0] < 30
    assert np.unravel_index(yellow.argmax(), yellow.shape)[1] >= 60
    # Gray print keeps the order, too.
    ramp = np.linspace(0, 1, 50, dtype=np.float32)[None]
    strip = np.asarray(overlay(Image.new("RGB", (50, 1), "grey"), ramp, 1.0).convert("L")).astype(int)[0]
    assert (np.diff(strip) >= 0).all()
    assert strip[-1] - strip[0] > 60


@pytest.mark.parametrize("content", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"not an image"])
def test_files_that_are_no_images_are_refused_before_anything_is_written(
    content, run, images, tmp_path, capsys
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(content)
    error = _error_of(capsys, "attend", run, images[0], bad, "--out", tmp_path / "out")
    assert f"{bad}: not a readable image" in error
    assert not (tmp_path / "out").exists()


def test_an_image_of_a_hundred_megapixels_is_refused(run, tmp_path, capsys) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    error = _error_of(capsys, "attend", run, tmp_path / "huge.png", "--out", tmp_path / "out")
    assert "huge.png: more than 89,478,485 pixels" in error


def test_a_plain_decoder_is_refused(packed, tmp_path, capsys, images) -> None:
    tiny_config(tmp_path, packed, "train.steps=1", 'model.decoder={name="plain", num_layers=1}')
    main(["train", str(tmp_path / "experiment.toml"), "--out", str(tmp_path / "run")])
    error = _error_of(capsys, "attend", tmp_path / "run", *images, "--out", tmp_path / "out")
    assert "its decoder is 'plain'" in error


def test_missing_runs_and_unwritable_folders_are_refused(run, images, tmp_path, capsys) -> None:
    assert "no: no such folder" in _error_of(capsys, "attend", tmp_path / "no", images[0], "--out", tmp_path)
    assert "no checkpoint, so no run" in _error_of(capsys, "attend", tmp_path, images[0], "--out", tmp_path)
    assert "expected either" in _error_of(capsys, "attend", run, "--out", tmp_path)
    assert "No such file or directory" in _error_of(
        capsys, "attend", run, tmp_path / "no.jpg", "--out", tmp_path
    )
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in _error_of(capsys, "attend", run, images[0], "--out", tmp_path / "file")
