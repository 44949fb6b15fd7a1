"""Learning rate schedule: linear warmup, then cosine decay to zero."""

import math


def lr_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the fraction of the peak learning rate at a step.

    Args:
        step: From 0.
        steps: Of the whole run.
        warmup_ratio: Fraction of the steps with linear warmup.

    Source:
        Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5, without restarts.

    Examples:
        >>> [round(lr_factor(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    warmup_steps = round(steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
