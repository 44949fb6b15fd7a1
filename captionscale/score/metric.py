"""What a metric is: statistics of each image, and the value of their sum over images."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64

from captionscale.errors import UserError
from captionscale.files import sha256_of


class Metric(ABC):
    """A metric of captions.

    `metrics.METRICS` lists captionscale's own; a user's own is named `module:Class` and needs no arguments.
    The bootstrap scores thousands of sets of images by sums of their statistics, so statistics must be
    additive: an image's row may depend on the references of all images, but on no other image's caption.

    Attributes:
        name: As in receipts and tables.
        range: Lowest and highest value of an image and of a corpus.
        width: Statistics of an image.
        external: Another process computes the statistics, so other metrics are computed meanwhile.
    """

    name: str
    range: tuple[float, float] = (0.0, 1.0)
    width: int = 2
    external: bool = False

    @property
    def family(self) -> str:
        """Metrics of one family share their statistics."""
        return self.name

    @abstractmethod
    def statistics(
        self, candidates: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Float64[np.ndarray, "image statistic"]:
        """Return the statistics of each image.

        Args:
            candidates: One caption for each image: lower-case words without punctuation, joined by spaces.
                A caption may be empty.
            references: One or more for each image, in the same form.
        """

    @abstractmethod
    def corpus_score(self, sums: Float[np.ndarray, "*sets statistic"]) -> Float64[np.ndarray, "*sets"]:
        """Return the value of sets of images from their summed statistics; a single row is one image."""

    def corpus_value(self, statistics: Float64[np.ndarray, "image statistic"]) -> float:
        """Return the value of all images together."""
        return float(self.corpus_score(np.array([column.sum() for column in statistics.T])))

    @property
    def signature(self) -> str:
        """What the value depends on, after the name in lower case; values of two signatures do not compare.

        `{images}` is replaced by the number of images. Default: the class, and the SHA-256 of its file.
        """
        kind = type(self)
        file = Path(inspect.getfile(kind))
        return f"{self.name.lower()} {kind.__module__}:{kind.__qualname__} {sha256_of(file)[:8]}"

    def close(self) -> None:  # noqa: B027
        """Release what the metric keeps for the next captions."""


class MeanMetric(Metric):
    """A metric whose corpus value is the mean over images."""

    @abstractmethod
    def per_image(
        self, candidates: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Sequence[float] | Float64[np.ndarray, "image"]:
        """Return the value of each image, of the arguments of `statistics`."""

    def statistics(
        self, candidates: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Float64[np.ndarray, "image 2"]:
        """Return each image's value, and 1."""
        values = np.asarray(self.per_image(candidates, references), np.float64)
        return np.stack([values, np.ones_like(values)], axis=1)

    def corpus_score(self, sums: Float[np.ndarray, "*sets 2"]) -> Float64[np.ndarray, "*sets"]:
        """Return the mean."""
        return np.asarray(sums[..., 0] / sums[..., 1])


class ComputedMetric(MeanMetric):
    """A metric whose values were computed before, from more than captions and references."""

    signature = ""

    def __init__(
        self,
        name: str,
        values: Sequence[float] | Float64[np.ndarray, "image"],
        signature: str,
        bounds: tuple[float, float] = (-math.inf, math.inf),
    ):
        """Take the values, by ascending image id, and the other attributes."""
        self.name, self.range, self.signature = name, bounds, signature
        self._values = values

    def per_image(
        self, candidates: Sequence[str], _: object
    ) -> Sequence[float] | Float64[np.ndarray, "image"]:
        """Return the given values."""
        if len(self._values) != len(candidates):
            raise UserError(
                f"{self.name}: found values of {len(self._values):,} images, expected {len(candidates):,};"
                " compute it for the same images"
            )
        return self._values
