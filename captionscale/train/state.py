"""How far a run is."""

from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import msgspec

Step: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=10**12)]
"""Optimiser steps: as many as the names of files have room for."""


@dataclass
class TrainState:
    """How far a run is: all that is carried from step to step beside weights and optimiser."""

    step: Step = 0
    """Optimiser steps done."""
    best_score: float = -1.0
    """Of the validation split, in `train.score_metric`; negative before the first scoring."""
    best_step: Step = 0
    scores_since_best: Step = 0
    validated_step: Step = 0
    """Step of the last validation."""
    scored_step: Step = 0
    """Step of the last one whose scores count; they come later than its captions."""
    scaler: dict[str, int | float] = field(default_factory=dict)
    """The fp16 loss scaler's state."""
    initial_figures: dict[str, float] = field(default_factory=dict)
    """First figures of the objective."""

    def record_score(self, step: int, score: float) -> None:
        """Take the score of a step into account."""
        self.scored_step = step
        better = score > self.best_score
        self.scores_since_best = 0 if better else self.scores_since_best + 1
        if better:
            self.best_score, self.best_step = score, step
