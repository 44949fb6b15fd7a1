"""What learns at a step, how fast, and AdamW over it."""

from typing import TypeVar

from torch.optim import AdamW

from captionscale.config import Train
from captionscale.model.captioner import Captioner

T = TypeVar("T")


def make_optimizer(captioner: Captioner, settings: Train) -> AdamW:
    """Return AdamW over what learns: each part at its own rate, decay on matrices only.

    Args:
        captioner: Whose `requires_grad` says what learns.
        settings: The config's section `train`.

    Returns:
        The optimiser; each of its groups holds its `peak_lr`.
    """
    encoder = captioner.encoder
    rates = _for_each(settings.encoder_lr, len(encoder.stages))
    parts = [*zip(encoder.stages, rates, strict=True), (list(captioner.decoder.parameters()), settings.lr)]
    groups = []
    for part, lr in parts:
        learning = [parameter for parameter in part if parameter.requires_grad]
        for matrices, decay in ((True, settings.weight_decay), (False, 0.0)):
            members = [parameter for parameter in learning if (parameter.ndim > 1) == matrices]
            if members:
                groups.append({"params": members, "peak_lr": lr, "weight_decay": decay})
    return AdamW(groups, fused=True)


def unfreeze(captioner: Captioner, settings: Train, step: int) -> bool:
    """Let the parts of the encoder learn that `train.unfreeze_at` lets learn at a step.

    Returns:
        Whether other parts learn now than before.
    """
    encoder = captioner.encoder
    return encoder.unfreeze(step, _for_each(settings.unfreeze_at, len(encoder.stages)))


def _for_each(value: T | tuple[T, ...], parts: int) -> tuple[T, ...]:
    """Return what a setting says for each part of the encoder: it may give one value for all."""
    # What does not learn at all has no parts, though one value may be given.
    return value[:parts] if isinstance(value, tuple) else (value,) * parts
