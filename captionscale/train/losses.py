"""What training minimises."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from captionscale.vocab import PAD


def cross_entropy(
    logits: Float[Tensor, "caption time word"],
    targets: Int[Tensor, "caption time"],
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """Return the sum over all words of their negative log-probability.

    A sum, not a mean: the step divides by its number of words over all ranks, so that each word weighs the
    same wherever it is read.

    Args:
        logits: Of the word that follows each time.
        targets: That word; padding counts nothing.
        label_smoothing: Share of the target that goes to all words alike.

    Source:
        Label smoothing: Szegedy et al. 2016 (arXiv:1512.00567), section 7.
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=PAD,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
