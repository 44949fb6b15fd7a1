import pytest
import torch

from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.tools.bench import tutorial
from captionscale.tools.bench.tutorial import Sizes

TINY = Sizes(images=4, words=30, length=7, grids=(2,), captions=2, encoder="resnet18", side=32)


def test_both_ways_of_a_step_learn_the_same_and_are_raced() -> None:
    heats = tutorial.bench(rounds=1, sizes=TINY)
    assert [len(heat.lanes) for heat in heats] == [2, 2, 3]
    for heat in heats:
        assert all(pace > 0 for lane in heat.lanes for pace in lane.per_second)
        assert "differ by" in heat.notes[1]
        assert "The limit" in heat.notes[2]


def test_a_way_that_learns_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Captioner.encode
    monkeypatch.setattr(Captioner, "encode", lambda self, pictures: 1.01 * real(self, pictures))
    with pytest.raises(UserError, match="loss or gradients differ"):
        tutorial._steps(TINY, 1)


def test_captions_are_as_long_as_asked_for_and_end_once() -> None:
    target = tutorial._target(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 5, TINY)
    assert target.tokens.shape == (20, TINY.length + 1)
    assert (target.tokens[0] != 0).all()
    assert ((target.tokens == 2).sum(1) == 1).all()
