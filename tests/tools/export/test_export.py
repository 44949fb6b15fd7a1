import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from experiment import peaked_run
from tiny_decoders import build_decoder

import captionscale
from captionscale.cli import main
from captionscale.config_model import EncoderConfig, Model, TorchvisionConfig
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.search.generate import search
from captionscale.score import score
from captionscale.tools.export import bundle
from captionscale.tools.export.check import check
from captionscale.tools.export.parts import ExportedCaptioner, Part, Run, parts
from captionscale.tools.export.programs import write_onnx, write_torch
from captionscale.train.checkpoint import open_checkpoint

pytestmark = pytest.mark.long

SIZE = 32
TINY = EncoderConfig(name="tiny_encoder:TinyEncoder")
MODELS: dict[str, tuple[EncoderConfig, dict[str, Any]]] = {
    "plain": (
        TorchvisionConfig(name="resnet18", weights="none"),
        {"image_batch_norm": True, "tie_weights": True},
    ),
    "attention": (TINY, {"attention_gate": True, "word_head": "maxout"}),
    "top_down": (TINY, {"variational_dropout": True}),
}


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Sizes are symbols while a program is traced; beartype does not accept them as `int`."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, options = MODELS["attention"]
    changes = [f"model.decoder.{key}={json.dumps(value)}" for key, value in options.items()]
    return peaked_run(tmp_path_factory.mktemp("export"), packed, *changes)


def captioner(name: str) -> Captioner:
    torch.manual_seed(0)
    encoder, options = MODELS[name]
    settings = build_decoder(name, 1, 9, embed_size=8, hidden_size=8, **options).config
    made = Captioner(Model(encoder=encoder, decoder=settings), 30)
    for parameter in made.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def export(run: Path, out: Path, to: str, *options: str) -> None:
    main(["export", str(run), "--format", to, "--out", str(out), *options])


def assert_equal_captions(model: Captioner, exported: ExportedCaptioner, size: int) -> None:
    images = torch.randint(256, (5, 3, size, size), dtype=torch.uint8)
    for beam in (1, 4):
        ours, theirs = (
            search(each, features, beam=beam, max_words=8, length_penalty=0.7)
            for each, features in ((model.decoder, model.encode(images)), (exported, exported.encode(images)))
        )
        for mine, other in zip(ours, theirs, strict=True):
            # Others of a beam may differ in order by rounding.
            assert mine[0].tokens == other[0].tokens
            for one, two in zip(mine, other, strict=True):
                assert two.log_prob == pytest.approx(one.log_prob, abs=1e-3)
    assert check(model, exported, images, 8).logits < 3e-4


@pytest.mark.parametrize(
    ("name", "write", "batch"),
    [
        *((name, write_torch, None) for name in MODELS),
        ("attention", write_torch, 3),
        # The command exports a decoder with attention below.
        ("plain", write_onnx, None),
        ("top_down", write_onnx, None),
    ],
)
def test_programs_caption_as_the_model_does_at_any_batch_size(tmp_path: Path, name, write, batch) -> None:
    model = captioner(name)
    made = parts(model, SIZE, batch or 2)
    programs = {part.name: write(part, tmp_path, batch) for part in made[name != "plain" :]}
    # An encoder is the same whatever the decoder.
    programs.setdefault("encoder", lambda inputs: made[0].module(tuple(inputs)))
    assert_equal_captions(model, ExportedCaptioner(made, programs, batch), SIZE)


def test_programs_that_differ_from_the_model_are_refused(tmp_path: Path) -> None:
    model = captioner("top_down")
    made = parts(model, SIZE, 2)
    programs = {part.name: write_torch(part, tmp_path, None) for part in made}
    step = programs["step"]
    programs["step"] = lambda inputs: [step(inputs)[0] + 0.01, *step(inputs)[1:]]
    images = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    with pytest.raises(UserError, match=r"logits differ by 0\.01.*among images 0 to 1, expected"):
        check(model, ExportedCaptioner(made, programs, None), images, 8)


@pytest.mark.parametrize("batch", [None, 3], ids=["any batch", "batches of 3"])
def test_onnx_programs_and_their_example_caption_as_the_command_without_this_package_or_torch(
    run: Path,
    synthetic_coco: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    batch: int | None,
) -> None:
    programs: dict[str, Run] = {}

    def write(part: Part, folder: Path, batch: int | None) -> Run:
        programs[part.name] = write_onnx(part, folder, batch)
        return programs[part.name]

    monkeypatch.setitem(bundle._WRITERS, "onnx", write)
    export(run, tmp_path / "out", "onnx", *(() if batch is None else ("--batch-size", str(batch))))
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{tmp_path / 'out'}: checked on 8 images of split 'val': greatest difference of logits"
    )
    assert printed.endswith("the same captions by greedy search\n")
    model = open_checkpoint(run).captioner()
    assert_equal_captions(model, ExportedCaptioner(parts(model, 64, 1), programs, batch), 64)
    # They have the model's image size: pillow and torch resize a little differently.
    files = [str(file) for file in sorted((synthetic_coco / "test2017").iterdir())]
    forbidden = "import sys; sys.modules['captionscale'] = sys.modules['torch'] = None; "
    run_it = "import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    # A beam begins with one row, which fills up a batch of 3 as greedy search does.
    for beam in ("1", "3") if batch is None else ("3",):
        command = [sys.executable, "-c", forbidden + run_it, str(tmp_path / "out" / "example.py"), *files]
        done = subprocess.run([*command, "--beam", beam], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        main(["caption", str(run), *files, "--beam", beam])
        assert done.stdout == capsys.readouterr().out


def test_a_hub_folder_is_loaded_and_verified_and_names_no_folder_of_this_machine(
    run: Path, packed: Path, synthetic_coco: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hub"
    export(run, out, "hub")
    names = {"README.md", "config.json", "config.toml", "model.safetensors", "state.json", "vocab.json"}
    assert {path.name for path in out.iterdir()} == names
    files = sorted((synthetic_coco / "test2017").iterdir())
    ours, theirs = (captionscale.load(folder).caption(files) for folder in (run, out))
    assert [(it.words, it.log_prob) for it in ours] == [(it.words, it.log_prob) for it in theirs]
    text = "".join(path.read_text() for path in out.iterdir() if path.suffix != ".safetensors")
    assert str(packed.parent) not in text
    assert str(run.parent) not in text
    (out / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"sha256 of vocab\.json"):
        captionscale.load(out)


def test_the_card_has_the_scores_of_exactly_these_weights(run: Path, tmp_path: Path) -> None:
    assert "not scored" in _card(run, tmp_path / "before")
    captions, references = {1: "a dog", 2: "a cat"}, {1: ["a dog runs"], 2: ["a cat sits"]}
    made = {"split": "test"}
    mine = score(
        captions, references, ["BLEU-1"], provenance=made, hashes={"model": open_checkpoint(run).sha256}
    )
    other = score(captions, references, ["BLEU-2"], provenance=made, hashes={"model": "of another run"})
    mine.write(run / "receipt.json")
    other.write(run / "scores" / "other" / "receipt.json")
    card = _card(run, tmp_path / "after")
    low, high = mine.intervals["BLEU-1"]
    assert "Split `test`: 2 images, 2 references." in card
    assert f"| BLEU-1 | {mine.scores['BLEU-1']:.4f} | {low:.4f} to {high:.4f} |" in card
    assert "BLEU-2" not in card
    assert "| train | 48 | 240 |" in card


def _card(run: Path, out: Path) -> str:
    export(run, out, "hub")
    return (out / "README.md").read_text(encoding="utf-8")


def test_a_refused_export_is_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    refused: list[tuple[Path, str, list[str], str]] = [
        (tmp_path, "hub", [], "no checkpoint, so no run"),
        (
            run,
            "hub",
            ["--batch-size", "2"],
            "--batch-size 2: expected at least 1, and --format onnx or torch",
        ),
        (run, "torch", ["--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (run, "torch", ["--shards", str(tmp_path)], "export: found no images to check on"),
    ]
    for folder, to, options, expected in refused:
        with pytest.raises(SystemExit) as caught:
            export(folder, out, to, *options)
        assert caught.value.code == 1
        assert expected in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(bundle, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(SystemExit):
        export(run, out, "onnx")
    assert "onnxscript is not installed" in capsys.readouterr().err
    export(run, out, "hub")
    before = json.loads((out / "state.json").read_text())
    with pytest.raises(SystemExit):
        export(run, out, "hub")
    assert "exists already, expected a new folder" in capsys.readouterr().err
    assert json.loads((out / "state.json").read_text()) == before
