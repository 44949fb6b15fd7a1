"""The examples of docs/extending.md work from files outside the package."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import metric_contract
import objective_contract
import pytest
import source_contract
import torch
from PIL import Image

from captionscale import plugins
from captionscale.cli import main
from captionscale.errors import UserError
from captionscale.score import Receipt
from captionscale.score.metric import Metric
from captionscale.score.metrics import METRICS
from captionscale.score.worker import BackgroundScorer
from captionscale.train.objective import objective_class

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
assert len(EXAMPLES) == 5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the page's examples."""
    for name, text in EXAMPLES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Of processes that it starts.
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    yield tmp_path
    for name in EXAMPLES:
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)


def test_a_class_in_the_current_folder_is_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [each for each in sys.path if each not in ("", str(folder))])
    (folder / "evil.py").write_text("import pathlib; pathlib.Path('executed').touch()")
    with pytest.raises(UserError, match=r"evil:Metric: cannot be imported .*No module named 'evil'"):
        plugins.load("evil:Metric", Metric)
    assert not Path("executed").exists()


def test_a_metric_of_ones_own_is_scored_and_compared_like_any_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    my_metrics = importlib.import_module("my_metrics")
    for metric in (my_metrics.WordCount(), my_metrics.Brevity()):
        metric_contract.check(metric)
    captions, human = {1: "A dog runs.", 2: "two cats"}, [(1, "a dog"), (2, "two cats sleep"), (2, "a cat")]
    Path("captions.json").write_text(
        json.dumps([{"image_id": key, "caption": text} for key, text in captions.items()])
    )
    notes = [{"id": at, "image_id": key, "caption": text} for at, (key, text) in enumerate(human)]
    images = [{"id": key, "file_name": f"{key}.jpg"} for key in captions]
    Path("references.json").write_text(json.dumps({"images": images, "annotations": notes}))
    inputs = ["--captions", "captions.json", "--references", "references.json", "--out", "receipt.json"]
    own = ["--metric", "my_metrics:WordCount", "--metric", "my_metrics:Brevity"]
    main(["score", *inputs, *own])
    assert "WordCount 2.5000000000  [2.0000, 3.0000]" in capsys.readouterr().out
    receipt = Receipt.read(folder / "receipt.json")
    assert list(receipt.scores) == [*METRICS, "WordCount", "Brevity"]
    assert receipt.scores["WordCount"] == 2.5
    assert receipt.scores["Brevity"] == 1
    assert receipt.images.scores["WordCount"].tolist() == [3, 2]
    assert receipt.metric_signature["wordcount"].startswith("wordcount my_metrics:WordCount ")

    # A mean needs no class to be compared; of another metric the class must be named.
    arguments = ["compare", "receipt.json", "receipt.json", "--json"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "Brevity = 1, expected what the receipt's statistics give" in capsys.readouterr().err
    main([*arguments, "--metric", "my_metrics:Brevity"])
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert [each["metric"] for each in differences] == list(receipt.scores)


@pytest.mark.usefixtures("folder")
def test_training_scores_by_a_metric_of_ones_own() -> None:
    scorer = BackgroundScorer({1: ["a dog"]}, ["BLEU-4", "my_metrics:WordCount"])
    try:
        scorer.submit({1: "a dog runs"})
        scores = scorer.result(timeout_s=300.0)
    finally:
        scorer.close()
    assert scores is not None
    assert scores["my_metrics:WordCount"] == 3


def test_training_has_an_objective_of_ones_own(folder: Path, packed: Path) -> None:
    name = "my_objective:LongestReference"
    config = objective_contract.config_of(name, folder, packed)
    objective_contract.check(objective_class(name), config, packed)


def test_a_source_of_ones_own_is_packed_like_any_other(folder: Path) -> None:
    for number, name in enumerate(("red", "green")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{name}.png")
    (folder / "captions.xml").write_text(
        '<album><photo file="red.png"><text>a red wall</text><text>a wall</text></photo>'
        '<photo file="green.png"><text>a green wall</text></photo></album>'
    )
    source_contract.check("my_source:Album", ["--album", "captions.xml"], folder / "shards")


def load_experiment(folder: Path, *overrides: str):
    from captionscale import toml

    (folder / "experiment.toml").write_text('[data]\nshards = "shards"\n', encoding="utf-8")
    return toml.load(folder / "experiment.toml", overrides)


def test_an_encoder_and_a_decoder_of_ones_own_caption_and_train(folder: Path) -> None:
    from captionscale import toml
    from captionscale.model.captioner import Captioner
    from captionscale.model.search.generate import search

    decoder = 'model.decoder={name="my_decoder:MyDecoder", size=24}'
    config = load_experiment(
        folder, decoder, "model.encoder.name=my_encoder:MyEncoder", "model.encoder.width=8"
    )
    assert (config.model.decoder.size, config.model.encoder.width) == (24, 8)
    (folder / "again.toml").write_text(toml.dumps(config), encoding="utf-8")
    assert toml.load(folder / "again.toml") == config
    captioner = Captioner(config.model, 20)
    captioner.encoder.load_pretrained()
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    features = captioner.encode(images)
    rows, columns = captioner.encoder.grid(64, 64)
    assert features.shape == (2, rows * columns, captioner.encoder.feature_size)
    tokens = torch.tensor([[1, 5, 6], [1, 7, 0], [1, 4, 8]])
    logits, attention = captioner(images, tokens, [3, 2, 3], torch.tensor([0, 0, 1]))
    assert logits.shape == (8, 20)
    assert attention is None
    logits.sum().backward()
    found = search(captioner.eval().decoder, features, beam=3, max_words=5, length_penalty=0.7)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (
            ['model.decoder={name="my_decoder:MyDecoder", hidden_size=3}'],
            "unknown key 'hidden_size' with decoder",
        ),
        (
            ['model.decoder={name="my_decoder:MyDecoder", size="x"}'],
            "size = 'x': input should be a valid integer",
        ),
        (["model.decoder.name=my_decoder:Other"], r"my_decoder:Other: cannot be imported \(AttributeError"),
        (["model.decoder.name=no_module:X"], r"no_module:X: cannot be imported \(ModuleNotFoundError"),
        (["model.decoder.name=my_encoder:MyEncoder"], "expected a class derived from .*DecoderConfig"),
        (
            ["model.encoder.name=my_encoder:MyEncoder", "model.encoder.output_stride=16"],
            "unknown key 'output_stride' with encoder 'my_encoder:MyEncoder'.* change model.encoder.name",
        ),
        (["model.encoder.name=resnet19"], "name = 'resnet19': input should be 'resnet18'.* or module:Class"),
    ],
)
def test_a_plug_in_that_does_not_fit_is_refused(folder: Path, overrides: list[str], error: str) -> None:
    from captionscale.errors import UserError

    with pytest.raises(UserError, match=error):
        load_experiment(folder, *overrides)
