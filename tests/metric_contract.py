"""What every metric fulfills."""

import numpy as np
import pytest

from captionscale.score.metric import Metric

CANDIDATES = ["a dog runs", "", "two cats on a mat", "a dog runs", "the the the the", "nothing alike"]
REFERENCES = [
    ["a dog is running", "dog"],
    ["a bowl"],
    ["two cats sit on a mat"],
    ["a dog is running", "dog"],
    ["", "the end"],
    ["a red bus on the street"],
]
ORDER = [4, 2, 5, 0, 3, 1]


def check(metric: Metric) -> None:
    """Assert that a metric's values are those of its statistics, which are additive and within range."""
    rows = metric.statistics(CANDIDATES, REFERENCES)
    assert rows.shape == (len(CANDIDATES), metric.width)
    assert np.isfinite(rows).all(), "an empty text is no error"
    np.testing.assert_array_equal(rows[3], rows[0], "equal captions of equal references")
    moved = metric.statistics([CANDIDATES[at] for at in ORDER], [REFERENCES[at] for at in ORDER])
    np.testing.assert_allclose(moved, rows[ORDER], rtol=1e-12, atol=1e-12)

    sets = np.stack([rows.sum(axis=0), rows[0], 2 * rows[0], *rows])
    values = np.asarray(metric.corpus_score(sets))
    assert values.shape == (len(sets),)
    assert ((metric.range[0] <= values) & (values <= metric.range[1])).all()
    assert metric.corpus_value(rows) == pytest.approx(values[0], rel=1e-12)
    assert values[2] == pytest.approx(values[1], rel=1e-6, abs=1e-4), "an image drawn twice"
    assert values[1] == pytest.approx(values[3], rel=1e-12), "one image alone"

    word = metric.signature.split()[0]
    assert metric.family.lower() == word == word.lower()
    assert "|" not in metric.signature
