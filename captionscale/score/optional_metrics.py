"""What a metric beyond `metrics.METRICS` found: those that need more than captions and references."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True)
class OptionalMetrics:
    """Figures of metrics of which the corpus has the mean over its images.

    Attributes:
        per_image: The figures of each metric, by ascending image id.
        signature: What they were computed with, for the receipt's: two figures compare if it is the same.
    """

    per_image: dict[str, Float64[np.ndarray, "image"]]
    signature: str

    @property
    def values(self) -> dict[str, float]:
        """The corpus figure of each metric."""
        return {metric: float(figures.mean()) for metric, figures in self.per_image.items()}
