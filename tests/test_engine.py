import pytest
import torch
from torch import nn

from captionscale.engine import Engine
from captionscale.ranks import Ranks


def test_the_model_computes_in_the_run_s_precision() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 64)
    outputs = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(1)
        layer = nn.Linear(64, 4)
        with Ranks(precision) as ranks:
            outputs[precision] = Engine(ranks, layer, torch.optim.AdamW(layer.parameters()), 1.0)(inputs)
    assert outputs["bf16"].dtype == torch.float32
    assert 1e-4 < (outputs["bf16"] - outputs["fp32"]).abs().max() < 1e-1


def test_the_gradient_is_clipped_to_its_greatest_norm() -> None:
    layer = nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    with Ranks() as ranks:
        engine = Engine(ranks, layer, torch.optim.SGD(layer.parameters(), lr=1.0), 2.0)
        layer.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
        assert engine.update().item() == pytest.approx(5)
    assert (layer.weight - before).norm().item() == pytest.approx(2, rel=1e-4)
    assert layer.weight.grad is None
