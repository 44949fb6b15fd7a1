"""One optimizer step: the training loop, `doctor` and the benchmarks all run this one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from captionscale.config import Config
from captionscale.data.loader import Batch
from captionscale.distributed.engine import Engine
from captionscale.train import preemption
from captionscale.train.losses import (
    Target,
    cross_entropy,
    doubly_stochastic_penalty,
    mask_unsampleable_tokens,
)
from captionscale.train.objective import Objective
from captionscale.train.preemption import PreemptionFlag
from captionscale.train.schedule import lr_factor


class StepResult(NamedTuple):
    """What a step gives, still on the device."""

    loss: Float[Tensor, ""]
    """Over the micro-batches of all ranks."""
    grad_norm: Tensor
    """Before clipping."""
    losses: list[Tensor]
    """Of this rank's micro-batches; they sum to `loss` over all ranks."""


def micro_batch_loss(
    model: Callable[..., tuple[Tensor, Tensor | None]],
    target: Target,
    num_tokens: Float[Tensor, "2"],
    *,
    label_smoothing: float = 0.0,
    cross_entropy_weight: float = 1.0,
    doubly_stochastic_weight: float = 0.0,
    sampling_prob: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the loss of a micro-batch: its part of the mean over all tokens of the step.

    Args:
        model: A captioner or an engine.
        target: Captions to make more or less likely.
        num_tokens: `Target.num_tokens`, summed over all micro-batches of the step.
        label_smoothing: Of the cross-entropy.
        cross_entropy_weight: Weight of references where there are sampled captions too.
        doubly_stochastic_weight: Weight of the penalty on uneven attention.
        sampling_prob: Probability of reading the model's own token (scheduled sampling).
    """
    labels, rows = target.tokens[:, 1:], target.rows
    inputs = (target.images, target.input_tokens, target.lengths, target.image_index)
    logits, attention = model(*inputs, sampling_prob)
    logits = mask_unsampleable_tokens(logits, target, rows)
    losses = cross_entropy(logits, labels, label_smoothing, rows)
    if doubly_stochastic_weight and attention is not None:
        losses = losses + doubly_stochastic_weight * doubly_stochastic_penalty(attention, labels)
    return losses @ target.weights(num_tokens, cross_entropy_weight)


def training_step(
    engine: Engine,
    objective: Objective,
    batches: Sequence[tuple[int, Batch]],
    config: Config,
    step: int,
    steps: int,
    *,
    flag: PreemptionFlag | None = None,
    after_micro_batch: Callable[[int, Batch], None] = lambda *_: None,
) -> StepResult:
    """Take one optimizer step; all ranks call it.

    Args:
        engine: Holds the captioner and the optimizer.
        objective: Gives each micro-batch its target.
        batches: This rank's micro-batches, with their numbers within the step.
        config: The experiment.
        step: From 0; with the seed it determines all randomness.
        steps: Of the whole run.
        flag: Learns whether any rank was asked to stop when the step began.
        after_micro_batch: Called after each backward pass.
    """
    ranks, train = engine.ranks, config.train
    targets = objective.targets([(number, batch.to(ranks.device)) for number, batch in batches], step, ranks)
    counts = torch.stack([target.num_tokens for target in targets]).sum(0)
    *num_tokens, stop_requests = ranks.sum(*counts, preemption.requested())
    if flag:
        flag.update(stop_requests)
    for group in engine.param_groups:
        group["lr"] = group["peak_lr"] * lr_factor(step, steps, train.warmup_ratio)
    losses = []
    for (number, batch), target in engine.micro_batches(zip(batches, targets, strict=True)):
        ranks.seed(config.seed, step, number)
        loss = micro_batch_loss(
            engine,
            target,
            torch.stack(num_tokens),
            label_smoothing=objective.label_smoothing,
            cross_entropy_weight=objective.cross_entropy_weight,
            doubly_stochastic_weight=train.doubly_stochastic_weight,
            sampling_prob=train.scheduled_sampling * (step / steps),
        )
        # DDP averages over ranks, but each token has the same weight on every rank.
        engine.backward(loss * ranks.world_size)
        losses.append(loss.detach())
        after_micro_batch(number, batch)
    grad_norm = engine.step()
    return StepResult(ranks.sum(sum(losses))[0], grad_norm, losses)
