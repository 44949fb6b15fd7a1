import subprocess
import sys
from pathlib import Path

import pytest
from experiment import peaked_run
from PIL import Image

import captionscale
from captionscale.cli import main
from captionscale.errors import UserError
from captionscale.tools.captioner_api import CaptionPipeline


def images(synthetic_coco: Path) -> list[Path]:
    return sorted((synthetic_coco / "test2017").iterdir())


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaked_run(tmp_path_factory.mktemp("pipeline"), packed)


@pytest.fixture(scope="module")
def pipeline(run: Path) -> CaptionPipeline:
    return captionscale.load(run)


def test_python_returns_the_captions_of_the_command(
    pipeline: CaptionPipeline, run: Path, synthetic_coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = images(synthetic_coco)
    main(["caption", str(run), *map(str, files), "--beam", "3"])
    printed = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    found = pipeline.caption(files, beam=3)
    assert [caption.caption for caption in found] == printed
    assert len(set(printed)) > 1
    for caption in found:
        assert len(caption.words) == len(caption.probabilities) == len(caption.attention_maps or ())


@pytest.mark.usefixtures("started")
def test_importing_the_package_imports_no_torch() -> None:
    code = "import captionscale, sys; captionscale.load; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


def test_a_file_and_its_pillow_image_have_one_caption_in_any_batch(
    pipeline: CaptionPipeline, synthetic_coco: Path
) -> None:
    files = images(synthetic_coco)
    together = pipeline.caption(files, batch_size=3)
    opened = [Image.open(file) for file in files]
    for file, image, caption in zip(files, opened, together, strict=True):
        [alone], [other] = pipeline.caption([str(file)]), pipeline.caption([image])
        assert alone.words == other.words == caption.words
        assert alone.log_prob == pytest.approx(caption.log_prob, abs=1e-4)


def test_a_pillow_image_is_turned_upright_on_white_like_its_file(
    pipeline: CaptionPipeline, synthetic_coco: Path, tmp_path: Path
) -> None:
    image = Image.open(images(synthetic_coco)[0]).rotate(90).convert("RGBA")
    image.putalpha(120)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    by_file = pipeline.view(tmp_path / "turned.png")
    assert (by_file == pipeline.view(Image.open(tmp_path / "turned.png"))).all()
    assert (by_file != pipeline.view(image.convert("RGB"))).any()


def test_sampled_captions_are_functions_of_seed_and_position(
    pipeline: CaptionPipeline, synthetic_coco: Path
) -> None:
    files = images(synthetic_coco)[:1] * 5
    first, again, other = (
        [caption.words for caption in pipeline.caption(files, method="sample", seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({tuple(words) for words in first}) > 1


def test_all_captions_of_a_beam_come_best_first(pipeline: CaptionPipeline, synthetic_coco: Path) -> None:
    views = [pipeline.view(file) for file in images(synthetic_coco)[:2]]
    request = pipeline.generation_request(beam=4, length_penalty=0.0)
    best = pipeline.generate(views, request, [0, 1])
    for all_of, [first] in zip(pipeline.generate(views, request, [0, 1], return_all=True), best, strict=True):
        log_probs = [caption.log_prob for caption in all_of]
        assert len(all_of) == 4
        assert all_of[0].words == first.words
        assert log_probs == sorted(log_probs, reverse=True)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"baem": 3}, "search.baem=3: unknown key 'baem'; did you mean 'beam'?"),
        ({"beam": 0}, "search.beam=0: beam = 0: input should be greater than or equal to 1"),
        ({"prefix": "zebrafish"}, "'zebrafish' is not in this run's vocabulary"),
    ],
)
def test_invalid_requests_are_refused_by_name(pipeline: CaptionPipeline, request_, error) -> None:
    with pytest.raises(UserError) as caught:
        pipeline.caption([], **request_)
    assert str(caught.value).startswith(error) or error in str(caught.value)
    assert "--set" not in str(caught.value)


def test_a_single_image_outside_a_list_is_refused(pipeline: CaptionPipeline) -> None:
    with pytest.raises(ValueError, match="expected a list"):
        pipeline.caption("photo.jpg")
