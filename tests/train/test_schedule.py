import math

import pytest

from captionscale.train.schedule import lr_factor

RUNS = [(steps, warmup_ratio) for steps in (1, 2, 7, 100, 1001) for warmup_ratio in (0.0, 0.03, 0.5, 1.0)]


@pytest.mark.parametrize(("steps", "warmup_ratio"), RUNS)
def test_the_warmup_is_linear_and_the_rate_then_never_rises(steps, warmup_ratio) -> None:
    factors = [lr_factor(step, steps, warmup_ratio) for step in range(steps)]
    rising = round(steps * warmup_ratio)
    assert factors[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    assert factors[rising:] == sorted(factors[rising:], reverse=True)
    assert max(factors) == 1


@pytest.mark.parametrize(("steps", "warmup_ratio"), RUNS)
def test_the_learning_rate_is_positive_at_every_step(steps, warmup_ratio) -> None:
    assert all(0 < lr_factor(step, steps, warmup_ratio) <= 1 for step in range(steps))


def test_the_decay_is_half_a_cosine() -> None:
    for step in range(20, 100):
        assert lr_factor(step, 100, 0.2) == pytest.approx(math.cos(math.pi * (step - 20) / 160) ** 2)
    assert lr_factor(60, 100, 0.2) == pytest.approx(0.5)


def test_the_learning_rate_is_zero_after_the_last_step() -> None:
    assert lr_factor(100, 100, 0.03) == pytest.approx(0, abs=1e-12)
