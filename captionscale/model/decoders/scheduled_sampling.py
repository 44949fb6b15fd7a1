"""Training on words of the decoder's own, as it will have to read them when it writes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders.registry import Decoder
from captionscale.model.decoders.state import select
from captionscale.vocab import PAD, START


def rehearse(
    decoder: Decoder,
    features: Float[Tensor, "image region feature"],
    tokens: Int[Tensor, "caption time"],
    owners: Int[Tensor, "caption"],
    own_share: float,
) -> tuple[Float[Tensor, "caption time word"], Float[Tensor, "caption time region"] | None]:
    """Return the logits of each word that follows, and where the decoder looked, as its `forward` does.

    Each word after the first is with probability `own_share` not the reference's but drawn from what the
    decoder has just said: with y the reference's words and y' those that are read,

        y'_t ~ p(y_t | y'_1 .. y'_{t-1}) with probability own_share, else y'_t = y_t.

    No gradient flows through a draw. What follows the end of a reference stays padding, which is never drawn,
    nor is the start; the end is, where the decoder would have ended earlier. With an own_share of 0 this is
    `forward`, only slower.

    Args:
        decoder: Any.
        features: Of each picture.
        tokens: Start and words; what each time would read.
        owners: The row of `features` that each caption belongs to.
        own_share: 0 to 1; the paper's 1 - epsilon_i.

    Source:
        Bengio et al. 2015, "Scheduled Sampling" (arXiv:1506.03099), section 2.4.
    """
    state = select(decoder.start(features), owners)
    word = tokens[:, 0]
    said: list[Tensor] = []
    looks: list[Tensor] = []
    for time in range(tokens.shape[1]):
        if time:
            own = (torch.rand(len(tokens), device=tokens.device) < own_share) & (tokens[:, time] != PAD)
            word = torch.where(own, _draw(said[-1]), tokens[:, time])
        logits, state, weights = decoder.step(word, state)
        said.append(logits)
        looks += [] if weights is None else [weights]
    return torch.stack(said, 1), torch.stack(looks, 1) if looks else None


@torch.no_grad()
def _draw(logits: Float[Tensor, "caption word"]) -> Int[Tensor, "caption"]:
    """Draw a word for each row from what the decoder said."""
    chances = logits.float().softmax(1)
    for token in (PAD, START):
        chances[:, token] = -1
    # As torch.multinomial does, which waits for the device, and fails where a loss that is no number is told.
    return (chances / torch.empty_like(chances).exponential_()).argmax(1)
