"""AdamW over the trainable parameters, and gradual unfreezing."""

from typing import TypeVar

from torch.optim import AdamW

from captionscale.config import Train
from captionscale.model.captioner import Captioner

T = TypeVar("T")


def make_optimizer(captioner: Captioner, settings: Train) -> AdamW:
    """Return AdamW over parameters that require gradients, with weight decay on matrices only.

    Each stage of the encoder has its own learning rate; each parameter group holds its `peak_lr`.
    """
    stages = captioner.encoder.stages
    rates = _for_each(settings.encoder_lr, len(stages))
    groups = []
    for part, lr in (*zip(stages, rates, strict=True), (captioner.decoder.parameters(), settings.lr)):
        trainable = [parameter for parameter in part if parameter.requires_grad]
        for matrices, decay in ((True, settings.weight_decay), (False, 0.0)):
            if members := [parameter for parameter in trainable if (parameter.ndim > 1) == matrices]:
                groups.append({"params": members, "peak_lr": lr, "weight_decay": decay})
    return AdamW(groups, fused=True)


def unfreeze(captioner: Captioner, settings: Train, step: int) -> bool:
    """Unfreeze the stages of the encoder due at a step by `train.unfreeze_at`; return whether any changed."""
    encoder = captioner.encoder
    return encoder.unfreeze(step, _for_each(settings.unfreeze_at, len(encoder.stages)))


def _for_each(value: T | tuple[T, ...], parts: int) -> tuple[T, ...]:
    """Return the value of a setting for each stage of the encoder; it may be one for all."""
    # A frozen encoder has no stages, though one value may be given.
    return value[:parts] if isinstance(value, tuple) else (value,) * parts
