"""Training on words of the decoder's own, as it will have to read them when it writes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders.registry import Decoder
from captionscale.model.decoders.state import select
from captionscale.vocab import PAD, START


def scheduled_sampling_forward(
    decoder: Decoder,
    features: Float[Tensor, "image region feature"],
    tokens: Int[Tensor, "caption time"],
    image_index: Int[Tensor, "caption"],
    sampling_prob: float,
) -> tuple[Float[Tensor, "caption time word"], Float[Tensor, "caption time region"] | None]:
    """Return the logits of each word that follows, and where the decoder looked, as its `teacher_forced` does.

    Each word after the first is with probability `sampling_prob` not the reference's but drawn from what the
    decoder has just said: with y the reference's words and y' those that are read,

        y'_t ~ p(y_t | y'_1 .. y'_{t-1}) with probability sampling_prob, else y'_t = y_t.

    No gradient flows through a draw. What follows the end of a reference stays padding, which is never drawn,
    nor is the start; the end is, where the decoder would have ended earlier. With an sampling_prob of 0 this is
    `teacher_forced`, only slower.

    Args:
        decoder: Any.
        features: Of each image.
        tokens: Start and words; what each time would read.
        image_index: The row of `features` that each caption belongs to.
        sampling_prob: 0 to 1; the paper's 1 - epsilon_i.

    Source:
        Bengio et al. 2015, "Scheduled Sampling" (arXiv:1506.03099), section 2.4.
    """
    state = select(decoder.start(features), image_index)
    word = tokens[:, 0]
    said: list[Tensor] = []
    attentions: list[Tensor] = []
    for time in range(tokens.shape[1]):
        if time:
            own = (torch.rand(len(tokens), device=tokens.device) < sampling_prob) & (tokens[:, time] != PAD)
            word = torch.where(own, _draw(said[-1]), tokens[:, time])
        logits, state, weights = decoder.step(word, state)
        said.append(logits)
        attentions += [] if weights is None else [weights]
    return torch.stack(said, 1), torch.stack(attentions, 1) if attentions else None


@torch.no_grad()
def _draw(logits: Float[Tensor, "caption word"]) -> Int[Tensor, "caption"]:
    """Draw a word for each row from what the decoder said."""
    chances = logits.float().softmax(1)
    for token in (PAD, START):
        chances[:, token] = -1
    # As torch.multinomial does, which waits for the device, and fails where a loss that is no number is told.
    return (chances / torch.empty_like(chances).exponential_()).argmax(1)
