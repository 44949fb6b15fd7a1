"""Draw captions as likely as a decoder thinks them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders.registry import Decoder
from captionscale.model.decoders.state import select
from captionscale.model.search.constraints import UNCONSTRAINED, Constraints, Features, read_prefix
from captionscale.vocab import END, PAD

_FEW = 0.9
"""Share unfinished at which finished captions are laid aside: it costs a copy of the decoder's state."""


@torch.no_grad()
def sample(
    decoder: Decoder,
    features: Features,
    *,
    samples_per_image: int,
    max_words: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    constraints: Constraints = UNCONSTRAINED,
    uniforms: Float[Tensor, "caption number"] | None = None,
) -> tuple[Int[Tensor, "caption time"], Float[Tensor, "caption"]]:
    """Draw captions of each image.

    Each word takes one number: the word is the one in whose part of [0, 1) the number lies, where the words
    have parts as long as their probabilities. A caption is thus a function of its own uniforms alone.

    Args:
        decoder: In evaluation mode.
        features: Of each image.
        samples_per_image: Draws for each image.
        max_words: Greatest number of words.
        temperature: Divides the logits.
        top_k: Draw only from so many of the likeliest words.
        top_p: Draw only from the fewest of the likeliest words that have this probability together, after
            temperature and `top_k`.
        constraints: What may be said; words that may not are left out before the others.
        uniforms: From [0, 1), one for each word. Without them: torch's.

    Returns:
        Caption j of image i as row i * samples_per_image + j: words, the end token unless the caption was cut at
        `max_words`, then padding; and the logarithm of the probability with which it was drawn.

    Source:
        `top_p`: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751),
        equations 2 and 3.
    """
    if constraints.required:
        raise ValueError("a sampled caption cannot be made to say required words")
    begun = read_prefix(decoder, features, constraints.prefix)
    device, count = begun.tokens.device, len(begun.tokens) * samples_per_image
    active = torch.arange(len(begun.tokens), device=device).repeat_interleave(samples_per_image)
    tokens, state = begun.tokens[active], select(begun.state, active)
    said = torch.full((count, max_words), PAD, device=device)
    said[:, : len(constraints.prefix)] = begun.sequences[active]
    totals = torch.zeros(count, device=device)
    uniforms = torch.rand(count, max_words, device=device) if uniforms is None else uniforms
    # Which captions the rows are of that the decoder still reads, and which rows of these are finished.
    active, finished = torch.arange(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)
    longest = len(constraints.prefix)
    for time in range(longest, max_words):
        logits, state, _ = decoder.step(tokens, state)
        logits = logits.float() if temperature == 1 else logits.float() / temperature
        constraints.mask_logits(logits, said[active, :time], max_words)
        tokens, gains = _draw(logits, uniforms[active, time], top_k, top_p)
        tokens = tokens.masked_fill(finished, PAD)
        said[active, time] = tokens
        totals[active] += gains.masked_fill(finished, 0)
        longest, finished = time + 1, finished | (tokens == END)
        unfinished = len(finished) - int(finished.sum())
        if not unfinished:
            break
        if unfinished <= _FEW * len(finished):
            rows = (~finished).nonzero().squeeze(1)
            tokens, state, active, finished = select((tokens, state, active, finished), rows)
    return said[:, :longest], totals


def _draw(
    logits: Float[Tensor, "row word"], uniforms: Float[Tensor, "row"], top_k: int | None, top_p: float
) -> tuple[Int[Tensor, "row"], Float[Tensor, "row"]]:
    """Return a word for each row, and the logarithm of its probability."""
    words = None
    if top_k is not None and top_k < logits.shape[1]:
        logits, words = logits.topk(top_k)
    elif top_p < 1:
        logits, words = logits.sort(descending=True)
    if top_p < 1:
        shares = logits.softmax(1)
        logits = logits.masked_fill(shares.cumsum(1) - shares >= top_p, -torch.inf)
    peaks, likeliest = logits.max(1, keepdim=True)
    masses = (logits - peaks).exp_().cumsum_(1)
    whole = masses[:, -1:]
    places = torch.searchsorted(masses, uniforms.unsqueeze(1) * whole, right=True)
    places.clamp_(max=logits.shape[1] - 1)
    # Sums in another order than from left to right may fall by a rounding, at a word that may not be said.
    places = torch.where(logits.gather(1, places) > -torch.inf, places, likeliest)
    gains = logits.gather(1, places) - peaks - whole.log()
    tokens = places if words is None else words.gather(1, places)
    return tokens.squeeze(1), gains.squeeze(1)
