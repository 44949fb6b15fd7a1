"""Draw captions as likely as a decoder thinks them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders.registry import Decoder
from captionscale.model.decoders.state import select
from captionscale.model.search.constraints import FREE, Features, Rules, start
from captionscale.vocab import END, PAD

_FEW = 0.9
"""Share unfinished at which finished captions are laid aside: it costs a copy of the decoder's state."""


@torch.no_grad()
def sample(
    decoder: Decoder,
    features: Features,
    *,
    captions: int,
    max_words: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    rules: Rules = FREE,
    numbers: Float[Tensor, "caption number"] | None = None,
) -> tuple[Int[Tensor, "caption time"], Float[Tensor, "caption"]]:
    """Draw captions of each picture.

    Each word takes one number: the word is the one in whose part of [0, 1) the number lies, where the words
    have parts as long as their probabilities. A caption is thus a function of its own numbers alone.

    Args:
        decoder: In evaluation mode.
        features: Of each picture.
        captions: Draws for each picture.
        max_words: Greatest number of words.
        temperature: Divides the logits.
        top_k: Draw only from so many of the likeliest words.
        top_p: Draw only from the fewest of the likeliest words that have this probability together, after
            temperature and `top_k`.
        rules: What may be said; words that may not are left out before the others.
        numbers: From [0, 1), one for each word. Without them: torch's.

    Returns:
        Caption j of picture i as row i * captions + j: words, the end token unless the caption was cut at
        `max_words`, then padding; and the logarithm of the probability with which it was drawn.

    Source:
        `top_p`: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751),
        equations 2 and 3.
    """
    if rules.required:
        raise ValueError("a sampled caption cannot be made to say required words")
    begun = start(decoder, features, rules.prefix)
    device, count = begun.tokens.device, len(begun.tokens) * captions
    going = torch.arange(len(begun.tokens), device=device).repeat_interleave(captions)
    tokens, state = begun.tokens[going], select(begun.state, going)
    said = torch.full((count, max_words), PAD, device=device)
    said[:, : len(rules.prefix)] = begun.said[going]
    totals = torch.zeros(count, device=device)
    numbers = torch.rand(count, max_words, device=device) if numbers is None else numbers
    # Which captions the rows are of that the decoder still reads, and which rows of these are finished.
    going, finished = torch.arange(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)
    longest = len(rules.prefix)
    for time in range(longest, max_words):
        logits, state, _ = decoder.step(tokens, state)
        chances = logits.float() if temperature == 1 else logits.float() / temperature
        rules.forbid(chances, said[going, :time], max_words)
        tokens, gains = _draw(chances, numbers[going, time], top_k, top_p)
        tokens = tokens.masked_fill(finished, PAD)
        said[going, time] = tokens
        totals[going] += gains.masked_fill(finished, 0)
        longest, finished = time + 1, finished | (tokens == END)
        unfinished = len(finished) - int(finished.sum())
        if not unfinished:
            break
        if unfinished <= _FEW * len(finished):
            rows = (~finished).nonzero().squeeze(1)
            tokens, state, going, finished = select((tokens, state, going, finished), rows)
    return said[:, :longest], totals


def _draw(
    chances: Float[Tensor, "row word"], numbers: Float[Tensor, "row"], top_k: int | None, top_p: float
) -> tuple[Int[Tensor, "row"], Float[Tensor, "row"]]:
    """Return a word for each row, and the logarithm of its probability."""
    words = None
    if top_k is not None and top_k < chances.shape[1]:
        chances, words = chances.topk(top_k)
    elif top_p < 1:
        chances, words = chances.sort(descending=True)
    if top_p < 1:
        shares = chances.softmax(1)
        chances = chances.masked_fill(shares.cumsum(1) - shares >= top_p, -torch.inf)
    peaks, likeliest = chances.max(1, keepdim=True)
    masses = (chances - peaks).exp_().cumsum_(1)
    whole = masses[:, -1:]
    places = torch.searchsorted(masses, numbers.unsqueeze(1) * whole, right=True)
    places.clamp_(max=chances.shape[1] - 1)
    # Sums in another order than from left to right may fall by a rounding, at a word that may not be said.
    places = torch.where(chances.gather(1, places) > -torch.inf, places, likeliest)
    gains = chances.gather(1, places) - peaks - whole.log()
    tokens = places if words is None else words.gather(1, places)
    return tokens.squeeze(1), gains.squeeze(1)
