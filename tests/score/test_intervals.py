from collections.abc import Callable

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu

from captionscale.score import bleu, intervals
from captionscale.score.intervals import bootstrap_scores, interval
from captionscale.score.metric import ComputedMetric

WORDS = np.array(["a", "dog", "cat", "runs", "sits", "on", "the", "grass"])

MEAN = ComputedMetric("mean", (), "")


def sentences(random: np.random.Generator, count: int) -> list[str]:
    return [" ".join(random.choice(WORDS, random.integers(0, 9))) for _ in range(count)]


def means(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of a metric that is a mean."""
    return {"mean": np.stack([values, np.ones(len(values))], axis=1)}


def test_the_value_of_each_resample_equals_pycocoevalcaps() -> None:
    random = np.random.default_rng(0)
    candidates, references = sentences(random, 30), [sentences(random, 3) for _ in range(30)]
    metrics = [bleu.Bleu(n) for n in range(1, 5)]
    found = bootstrap_scores({"BLEU": bleu.statistics(candidates, references)}, metrics, resamples=5, seed=7)
    for number, weights in enumerate(np.concatenate(list(intervals._weights(30, 5, 7)))):
        assert weights.sum() == 30
        drawn = dict(enumerate(np.repeat(np.arange(30), weights)))
        theirs, _ = Bleu(4).compute_score(
            {number: references[image] for number, image in drawn.items()},
            {number: [candidates[image]] for number, image in drawn.items()},
            verbose=0,
        )
        assert [found[metric.name][number] for metric in metrics] == pytest.approx(theirs, rel=1e-12)


def test_resamples_depend_neither_on_the_values_nor_on_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.arange(40.0) ** 2
    whole = bootstrap_scores(means(values), [MEAN], resamples=50, seed=3)["mean"]
    assert bootstrap_scores(means(values + 1), [MEAN], resamples=50, seed=3)["mean"] == pytest.approx(
        whole + 1
    )
    assert not np.allclose(bootstrap_scores(means(values), [MEAN], resamples=50, seed=4)["mean"], whole)
    monkeypatch.setattr(intervals, "_MAX_WEIGHTS", 3 * 40 + 1)
    assert max(len(part) for part in intervals._weights(40, 50, 3)) == 3
    assert bootstrap_scores(means(values), [MEAN], resamples=50, seed=3)["mean"] == pytest.approx(whole)


@pytest.mark.parametrize("draw", [np.random.Generator.standard_normal, np.random.Generator.exponential])
def test_about_95_of_100_intervals_contain_the_true_value(draw: Callable[..., np.ndarray]) -> None:
    random = np.random.default_rng(1)
    truth = {"standard_normal": 0.0, "exponential": 1.0}[draw.__name__]
    held = 0
    for seed in range(300):
        values = bootstrap_scores(means(draw(random, size=100)), [MEAN], resamples=300, seed=seed)["mean"]
        low, high = interval(values)
        held += low <= truth <= high
    assert 0.90 < held / 300 < 0.98
