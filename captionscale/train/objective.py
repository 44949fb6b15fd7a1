"""What training optimizes: the base class of objectives, cross-entropy, and the registry."""

from collections.abc import Mapping, Sequence

from captionscale import plugins
from captionscale.config import OBJECTIVES, Config
from captionscale.data.loader import Batch
from captionscale.data.shards import Split
from captionscale.distributed.ranks import Ranks
from captionscale.model.captioner import Captioner
from captionscale.train.losses import Target
from captionscale.train.state import TrainState
from captionscale.vocab import Vocabulary


class Objective:
    """Base class of objectives: a new one implements `targets`.

    A step minimizes the cross-entropy of its targets: sampled captions weighted by their advantages, and
    references.
    """

    cross_entropy_weight: float = 1.0
    """Weight of references in the loss; sampled captions have the rest."""
    label_smoothing: float = 0.0
    """Of the cross-entropy."""
    check_images: int = 0
    """Train images that `check_start` is given."""
    progress_figures: tuple[str, ...] = ()
    """Names of figures shown while training."""

    def __init__(self, config: Config, captioner: Captioner, split: Split, vocabulary: Vocabulary):
        """Prepare to train a captioner, which no engine wraps, on a split."""
        self.config, self.captioner, self.split, self.vocabulary = config, captioner, split, vocabulary

    def targets(self, batches: Sequence[tuple[int, Batch]], step: int, ranks: Ranks) -> list[Target]:
        """Return the target of each micro-batch of a step.

        Args:
            batches: This rank's micro-batches on its device, with their numbers within the step.
            step: From 0. Randomness must depend on the seed, the step and the number alone.
            ranks: This process and its peers.
        """
        raise NotImplementedError

    def check_start(self, batch: Batch) -> None:
        """Check `check_images` train images on the device before the first step; rank 0 calls it.

        Raises:
            UserError: Training could not succeed.
        """

    def figures(self, ranks: Ranks) -> dict[str, float]:  # noqa: ARG002
        """Return figures of the last step for the log, over all ranks; all of them call it."""
        return {}

    def check_figures(self, state: TrainState, figures: Mapping[str, float]) -> None:
        """Compare logged figures with the first ones, `state.initial_figures`; rank 0 calls it.

        Raises:
            UserError: The run must stop.
        """


class CrossEntropyObjective(Objective):
    """Maximizes the likelihood of references."""

    def __init__(self, config: Config, captioner: Captioner, split: Split, vocabulary: Vocabulary):
        super().__init__(config, captioner, split, vocabulary)
        self.label_smoothing = config.train.label_smoothing

    def targets(self, batches: Sequence[tuple[int, Batch]], step: int, ranks: Ranks) -> list[Target]:  # noqa: ARG002
        """Return all references of each micro-batch."""
        return [
            Target(batch.images, batch.tokens, batch.image_index, lengths=batch.lengths)
            for _, batch in batches
        ]


def objective_class(name: str) -> type[Objective]:
    """Return the class of an objective by its name or `module:Class`.

    Raises:
        UserError: It cannot be imported, or is no `Objective`.
    """
    return plugins.load(OBJECTIVES.get(name, name), Objective)
