import math

import pytest
import torch
from torch import Tensor

from captionscale.train.losses import cross_entropy
from captionscale.vocab import PAD

CAPTIONS, TIMES, WORDS = 4, 6, 9


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(CAPTIONS, TIMES, WORDS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> Tensor:
    words = torch.randint(1, WORDS, (CAPTIONS, TIMES), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([6, 3, 1, 4])
    return words.where(torch.arange(TIMES) < lengths.unsqueeze(1), PAD)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_loss_is_the_sum_over_words_of_their_smoothed_negative_log_probability(
    logits, targets, smoothing
) -> None:
    expected = 0.0
    for caption in range(CAPTIONS):
        for time in range(TIMES):
            if (word := int(targets[caption, time])) != PAD:
                total = math.log(sum(math.exp(logit) for logit in logits[caption, time].tolist()))
                surprise = [total - logit for logit in logits[caption, time].tolist()]
                expected += (1 - smoothing) * surprise[word] + smoothing * sum(surprise) / WORDS
    assert cross_entropy(logits, targets, smoothing).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_counts_nothing_and_teaches_nothing(logits, targets, smoothing) -> None:
    logits.requires_grad_()
    loss = cross_entropy(logits, targets, smoothing)
    loss.backward()
    assert (logits.grad[targets == PAD] == 0).all()
    assert (logits.grad[targets != PAD].abs().amax(1) > 0).all()
    changed = logits.detach().clone()
    changed[targets == PAD] = 100
    assert cross_entropy(changed, targets, smoothing).item() == pytest.approx(loss.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_losses_of_the_parts_add_up_to_the_loss_of_the_whole(logits, targets, smoothing) -> None:
    whole = cross_entropy(logits, targets, smoothing).item()
    for cut in range(1, CAPTIONS):
        first = cross_entropy(logits[:cut], targets[:cut], smoothing)
        second = cross_entropy(logits[cut:], targets[cut:], smoothing)
        assert (first + second).item() == pytest.approx(whole)


def test_only_padding_costs_nothing(logits) -> None:
    assert cross_entropy(logits, torch.full((CAPTIONS, TIMES), PAD), 0.1).item() == 0


def test_half_precision_logits_are_summed_in_single_precision(logits, targets) -> None:
    loss = cross_entropy(logits.bfloat16(), targets, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(logits.bfloat16().float(), targets, 0.1).item())
