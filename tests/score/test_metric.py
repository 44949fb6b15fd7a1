from pathlib import Path

import metric_contract
import numpy as np
import pytest

from captionscale.errors import UserError
from captionscale.score.metric import ComputedMetric, MeanMetric, Metric
from captionscale.score.metrics import METRICS, measure


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_each_metric_fulfills_the_contract(metric: Metric) -> None:
    try:
        metric_contract.check(metric)
    finally:
        metric.close()


class Broken(MeanMetric):
    name = "Broken"

    def per_image(self, candidates: object, references: object) -> list[float]:  # noqa: ARG002
        return [float("nan")]


@pytest.mark.parametrize(
    ("metric", "found"),
    [
        (
            "json:JSONDecoder",
            "json:JSONDecoder: found <class .*, derived from captionscale.score.metric.Metric",
        ),
        (
            "nowhere:Metric",
            r"nowhere:Metric: cannot be imported \(ModuleNotFoundError: .*; see docs/extending",
        ),
        ("json:Nothing", r"json:Nothing: cannot be imported \(AttributeError"),
        (Broken(), r"Broken: found statistics of shape \(1, 2\), expected finite ones"),
        (ComputedMetric("Two", [1.0, 2.0], "two"), "Two: found values of 2 images, expected 1"),
    ],
)
def test_a_metric_that_breaks_the_contract_is_refused(metric: str | Metric, found: str) -> None:
    with pytest.raises(UserError, match=found):
        measure({1: "a dog"}, {1: ["a dog"]}, ["BLEU-1", metric])


def test_the_default_signature_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Broken().signature
    changed = tmp_path / "changed.py"
    changed.write_text("")
    monkeypatch.setattr("inspect.getfile", lambda _: str(changed))
    assert Broken().signature.split()[:2] == before.split()[:2]
    assert Broken().signature != before


def test_a_corpus_value_may_be_a_numpy_number() -> None:
    class Words(MeanMetric):
        name = "Words"

        def per_image(self, candidates: list[str], _: object) -> list[float]:
            return [len(each.split()) for each in candidates]

        def corpus_value(self, statistics: np.ndarray) -> np.float32:
            return np.float32(statistics[:, 0].mean())

    scores = measure({1: "a dog"}, {1: ["a dog"]}, [Words()])
    assert type(scores.values["Words"]) is float
