import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captionscale.train import losses
from captionscale.train.losses import Target, cross_entropy, doubly_stochastic_penalty
from captionscale.vocab import PAD

CAPTIONS, TIMES, WORDS = 4, 6, 9
ALL = torch.arange(CAPTIONS * TIMES)


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(CAPTIONS * TIMES, WORDS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> Tensor:
    tokens = torch.randint(1, WORDS, (CAPTIONS, TIMES), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([6, 3, 1, 4])
    return tokens.where(torch.arange(TIMES) < lengths.unsqueeze(1), PAD)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_loss_of_a_caption_is_the_sum_of_smoothed_negative_log_probabilities(
    logits, targets, smoothing
) -> None:
    expected = [0.0] * CAPTIONS
    for caption in range(CAPTIONS):
        for time in range(TIMES):
            if (token := int(targets[caption, time])) != PAD:
                row = logits[caption * TIMES + time].tolist()
                total = math.log(sum(map(math.exp, row)))
                losses = [total - logit for logit in row]
                expected[caption] += (1 - smoothing) * losses[token] + smoothing * sum(losses) / WORDS
    assert cross_entropy(logits, targets, smoothing, ALL).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_has_neither_loss_nor_gradient(logits, targets, smoothing) -> None:
    logits.requires_grad_()
    loss = cross_entropy(logits, targets, smoothing, ALL).sum()
    loss.backward()
    padding = targets.flatten() == PAD
    assert (logits.grad[padding] == 0).all()
    assert (logits.grad[~padding].abs().amax(1) > 0).all()
    changed = logits.detach().clone()
    changed[padding] = 100
    assert cross_entropy(changed, targets, smoothing, ALL).sum().item() == pytest.approx(loss.item())


def test_captions_of_padding_alone_have_no_loss(logits) -> None:
    assert cross_entropy(logits, torch.full((CAPTIONS, TIMES), PAD), 0.1, ALL).tolist() == [0] * CAPTIONS


def test_half_precision_logits_are_summed_in_single_precision(logits, targets) -> None:
    loss, expected = (
        cross_entropy(it, targets, 0.1, ALL) for it in (logits.bfloat16(), logits.bfloat16().float())
    )
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(expected.tolist())


def test_sampled_captions_and_references_share_the_loss_by_their_tokens() -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    tokens = torch.tensor([[1, 4, 2, 0], [1, 5, 6, 2], [1, 2, 0, 0]])
    advantages = torch.tensor([2.0, -1.0])
    target = Target(images, tokens, torch.zeros(3, dtype=torch.long), 2, lambda: advantages)
    assert target.num_tokens.tolist() == [5, 1]
    # Over all ranks there are ten sampled tokens and four of references.
    weights = target.weights(torch.tensor([10.0, 4.0]), cross_entropy_weight=0.2)
    assert weights.tolist() == pytest.approx([0.8 * 2 / 10, 0.8 * -1 / 10, 0.2 / 4])
    references = Target(images, tokens, torch.zeros(3, dtype=torch.long))
    assert references.num_tokens.tolist() == [0, 6]
    assert references.weights(torch.tensor([0.0, 6.0]), cross_entropy_weight=1.0).tolist() == pytest.approx(
        [1 / 6] * 3
    )


def test_attention_that_sums_to_one_at_each_region_has_no_penalty() -> None:
    # Two words, two regions; Xu et al. 2015, equation 14.
    even = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.7, 0.3]]])
    targets = torch.tensor([[5, 2, PAD]])
    assert doubly_stochastic_penalty(even, targets).tolist() == [0]
    stuck = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    assert doubly_stochastic_penalty(stuck, targets).tolist() == [(1 - 2) ** 2 + (1 - 0) ** 2]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(logits, targets, smoothing) -> None:
    images, image_index = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(CAPTIONS, dtype=torch.long)
    packed = Target(images, F.pad(targets, (1, 0), value=1), image_index).rows
    assert packed.tolist() == (targets != PAD).flatten().nonzero().flatten().tolist()
    losses, gradients = [], []
    for rows in (ALL, packed):
        leaf = logits.clone().requires_grad_()
        losses.append(cross_entropy(leaf[rows], targets, smoothing, rows))
        (losses[-1] @ torch.arange(1.0, CAPTIONS + 1)).backward()
        gradients.append(leaf.grad)
    assert losses[0].tolist() == pytest.approx(losses[1].tolist())
    assert torch.allclose(*gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_torch_for_any_number_of_rows_at_a_time(
    logits, targets, smoothing, dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, labels = torch.linspace(-1, 2, CAPTIONS * TIMES), targets.flatten()
    leaf = logits.to(dtype).requires_grad_()
    expected = F.cross_entropy(
        leaf.float(), labels, ignore_index=PAD, reduction="none", label_smoothing=smoothing
    )
    (gradient,) = torch.autograd.grad(expected @ weights, leaf)
    for cached in (1, 4 * WORDS, 10**6):
        monkeypatch.setattr(losses, "CACHE_ELEMENTS", cached)
        found = losses._CrossEntropy.apply(leaf, labels, smoothing)
        (ours,) = torch.autograd.grad(found @ weights, leaf)
        assert torch.equal(found, expected)
        assert ours.dtype == dtype
        assert (ours.float() - gradient.float()).norm() <= (
            1e-6 if dtype == torch.float32 else 1e-2
        ) * gradient.float().norm()
    assert losses._CrossEntropy.apply(leaf[:0], labels[:0], smoothing).shape == (0,)


def test_a_masked_word_has_no_probability_and_no_gradient(logits, targets) -> None:
    leaf = logits.index_fill(1, torch.tensor([WORDS - 1]), -math.inf).requires_grad_()
    labels = targets.clamp(max=WORDS - 2)
    loss = cross_entropy(leaf, labels, 0.0, ALL).sum()
    loss.backward()
    assert loss.item() == pytest.approx(cross_entropy(logits[:, :-1], labels, 0.0, ALL).sum().item())
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[:, -1] == 0).all()


def test_input_tokens_are_those_that_a_token_follows(targets) -> None:
    tokens = F.pad(targets, (1, 0), value=1)
    image_index = torch.zeros(CAPTIONS, dtype=torch.long)
    inputs = Target(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tokens, image_index).input_tokens
    assert ((inputs != PAD) == (targets != PAD)).all()
    assert (inputs == tokens[:, :-1])[inputs != PAD].all()
