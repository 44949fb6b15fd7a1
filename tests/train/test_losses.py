import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captionscale.train import losses
from captionscale.train.losses import Target, cross_entropy, doubly_stochastic_penalty
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
def test_a_captions_loss_is_the_sum_over_its_words_of_their_smoothed_negative_log_probability(
    logits, targets, smoothing
) -> None:
    expected = [0.0] * CAPTIONS
    for caption in range(CAPTIONS):
        for time in range(TIMES):
            if (word := int(targets[caption, time])) != PAD:
                total = math.log(sum(math.exp(logit) for logit in logits[caption, time].tolist()))
                surprise = [total - logit for logit in logits[caption, time].tolist()]
                expected[caption] += (1 - smoothing) * surprise[word] + smoothing * sum(surprise) / WORDS
    assert cross_entropy(logits, targets, smoothing).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_counts_nothing_and_teaches_nothing(logits, targets, smoothing) -> None:
    logits.requires_grad_()
    loss = cross_entropy(logits, targets, smoothing).sum()
    loss.backward()
    assert (logits.grad[targets == PAD] == 0).all()
    assert (logits.grad[targets != PAD].abs().amax(1) > 0).all()
    changed = logits.detach().clone()
    changed[targets == PAD] = 100
    assert cross_entropy(changed, targets, smoothing).sum().item() == pytest.approx(loss.item())


def test_only_padding_costs_nothing(logits) -> None:
    assert cross_entropy(logits, torch.full((CAPTIONS, TIMES), PAD), 0.1).tolist() == [0] * CAPTIONS


def test_half_precision_logits_are_summed_in_single_precision(logits, targets) -> None:
    loss = cross_entropy(logits.bfloat16(), targets, 0.1)
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(cross_entropy(logits.bfloat16().float(), targets, 0.1).tolist())


def test_sampled_and_peoples_captions_share_the_loss_by_their_words() -> None:
    pictures = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    tokens = torch.tensor([[1, 4, 2, 0], [1, 5, 6, 2], [1, 2, 0, 0]])
    advantages = torch.tensor([2.0, -1.0])
    target = Target(pictures, tokens, torch.zeros(3, dtype=torch.long), 2, lambda: advantages)
    assert target.num_tokens.tolist() == [5, 1]
    # Over all ranks there are ten sampled words and four of people.
    weights = target.weights(torch.tensor([10.0, 4.0]), cross_entropy_weight=0.2)
    assert weights.tolist() == pytest.approx([0.8 * 2 / 10, 0.8 * -1 / 10, 0.2 / 4])
    people = Target(pictures, tokens, torch.zeros(3, dtype=torch.long))
    assert people.num_tokens.tolist() == [0, 6]
    assert people.weights(torch.tensor([0.0, 6.0]), cross_entropy_weight=1.0).tolist() == pytest.approx(
        [1 / 6] * 3
    )


def test_attention_that_sees_each_region_once_in_a_caption_costs_nothing() -> None:
    # Two words, two regions; Xu et al. 2015, equation 14.
    even = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.7, 0.3]]])
    targets = torch.tensor([[5, 2, PAD]])
    assert doubly_stochastic_penalty(even, targets).tolist() == [0]
    stuck = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    assert doubly_stochastic_penalty(stuck, targets).tolist() == [(1 - 2) ** 2 + (1 - 0) ** 2]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_words_alone_cost_what_they_cost_among_padding(logits, targets, smoothing) -> None:
    pictures, image_index = (
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(CAPTIONS, dtype=torch.long),
    )
    rows = Target(pictures, F.pad(targets, (1, 0), value=1), image_index).rows
    assert rows is not None
    assert rows.tolist() == (targets != PAD).flatten().nonzero().flatten().tolist()
    both = []
    for some, only in ((None, logits), (rows, logits.flatten(0, 1)[rows])):
        leaf = only.detach().requires_grad_()
        losses = cross_entropy(leaf, targets, smoothing, some)
        (losses @ torch.arange(1.0, CAPTIONS + 1)).backward()
        both.append((losses.tolist(), leaf.grad if some is not None else leaf.grad.flatten(0, 1)[rows]))
    assert both[0][0] == pytest.approx(both[1][0])
    assert torch.allclose(both[0][1], both[1][1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_torchs_own_cross_entropy_however_many_rows_are_worked_at_a_time(
    logits, targets, smoothing, dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, wanted = torch.linspace(-1, 2, CAPTIONS * TIMES), targets.flatten()
    leaf = logits.to(dtype).flatten(0, 1).requires_grad_()
    chances = F.cross_entropy(
        leaf.float(), wanted, ignore_index=PAD, reduction="none", label_smoothing=smoothing
    )
    (gradient,) = torch.autograd.grad(chances @ weights, leaf)
    for cached in (1, 4 * WORDS, 10**6):
        monkeypatch.setattr(losses, "CACHE_ELEMENTS", cached)
        found = losses._CrossEntropy.apply(leaf, wanted, smoothing)
        (ours,) = torch.autograd.grad(found @ weights, leaf)
        assert torch.equal(found, chances)
        assert ours.dtype == dtype
        assert (ours.float() - gradient.float()).norm() <= (
            1e-6 if dtype == torch.float32 else 1e-2
        ) * gradient.float().norm()
    assert losses._CrossEntropy.apply(leaf[:0], wanted[:0], smoothing).shape == (0,)


def test_what_may_not_be_said_has_no_chance_and_learns_nothing(logits, targets) -> None:
    leaf = logits.index_fill(2, torch.tensor([WORDS - 1]), -math.inf).requires_grad_()
    wanted = targets.clamp(max=WORDS - 2)
    loss = cross_entropy(leaf, wanted, 0.0).sum()
    loss.backward()
    alone = cross_entropy(logits[:, :, :-1], wanted, 0.0).sum()
    assert loss.item() == pytest.approx(alone.item())
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[:, :, -1] == 0).all()


def test_what_a_time_reads_is_what_something_follows(targets) -> None:
    tokens = F.pad(targets, (1, 0), value=1)
    image_index = torch.zeros(CAPTIONS, dtype=torch.long)
    read = Target(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tokens, image_index).input_tokens
    assert ((read != PAD) == (targets != PAD)).all()
    assert (read == tokens[:, :-1])[read != PAD].all()
