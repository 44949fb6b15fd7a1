"""Progress of a run."""

from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import msgspec

Step: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=10**12)]
"""Optimizer steps; file names have twelve digits."""


@dataclass
class TrainState:
    """All state of a run besides weights and optimizer state."""

    step: Step = 0
    """Optimizer steps done."""
    best_score: float = -1.0
    """In `train.score_metric`, on the validation split; negative before the first score."""
    best_step: Step = 0
    scores_since_best: Step = 0
    validated_step: Step = 0
    """Step of the last validation."""
    scored_step: Step = 0
    """Step of the last validation whose scores count."""
    scaler: dict[str, int | float] = field(default_factory=dict)
    """The fp16 loss scaler's state."""
    initial_figures: dict[str, float] = field(default_factory=dict)
    """First figures of the objective."""

    def record_score(self, step: int, score: float) -> None:
        """Record the score of a step."""
        self.scored_step = step
        better = score > self.best_score
        self.scores_since_best = 0 if better else self.scores_since_best + 1
        if better:
            self.best_score, self.best_step = score, step
