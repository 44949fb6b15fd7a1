"""The learning rate of each step: a pure function."""

import math


def lr_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate that a step has: up in a line, down in a cosine.

    Args:
        step: From 0.
        steps: Of the whole run.
        warmup_ratio: Share of the steps in which it rises.

    Source:
        Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5, without restarts.

    Examples:
        >>> [round(lr_factor(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rising = round(steps * warmup_ratio)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
