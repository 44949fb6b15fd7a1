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
    """Results of a step, still on the device."""

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
        label_smoothing: Probability spread over all words.
        cross_entropy_weight: Weight of references; sampled captions have the rest.
        doubly_stochastic_weight: Weight of the penalty on uneven attention.
        sampling_prob: Probability of reading the model's own token (scheduled sampling).
    """
    # Before the forward pass is queued: on a GPU, copying the rows waits for what is.
    labels, rows = target.tokens[:, 1:], target.rows
    inputs = (target.images, target.input_tokens, target.lengths, target.image_index)
    logits, attention = model(*inputs, sampling_prob)
    losses = cross_entropy(mask_unsampleable_tokens(logits, target), labels, label_smoothing, rows)
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
    """Take one of `steps` optimizer steps; all ranks call it.

    `batches` are this rank's micro-batches with their numbers within the step. The seed and `step` (from 0)
    determine all random numbers. `flag` is set if a rank was asked to stop before the step.
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
