"""Sampling captions from a decoder."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captionscale.model.decoders.decoder import StepDecoder
from captionscale.model.search.constraints import UNCONSTRAINED, Constraints, Features, read_prefix
from captionscale.vocab import END, PAD

_FEW = 0.9
"""Finished captions are dropped when at most this fraction is left: dropping copies the state."""


@torch.no_grad()
def sample(
    decoder: StepDecoder,
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
    """Sample captions of each image.

    Each word takes one uniform number, by the inverse of the cumulative distribution. A caption is thus a
    function of its own uniforms alone.

    Args:
        decoder: In evaluation mode.
        features: Features of each image.
        samples_per_image: Captions per image.
        max_words: Maximum number of words.
        temperature: Divides the logits.
        top_k: Sample from this many most likely words only.
        top_p: Sample from the smallest set of most likely words with this total probability, after
            temperature and `top_k`.
        constraints: Forbidden words are masked before all else.
        uniforms: From [0, 1), one per word. Default: torch's.

    Returns:
        Caption j of image i as row i * samples_per_image + j: words, END unless it was cut at `max_words`,
        then PAD; and the log-probability with which it was sampled.

    Source:
        `top_p`: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751),
        equations 2 and 3.
    """
    if constraints.required:
        raise ValueError("sampling cannot enforce required words")
    start = read_prefix(decoder, features, constraints.prefix)
    device, count = start.tokens.device, len(start.tokens) * samples_per_image
    active = torch.arange(len(start.tokens), device=device).repeat_interleave(samples_per_image)
    tokens, state = start.tokens[active], decoder.select(start.state, active)
    sequences = torch.full((count, max_words), PAD, device=device)
    sequences[:, : len(constraints.prefix)] = start.sequences[active]
    totals = torch.zeros(count, device=device)
    uniforms = torch.rand(count, max_words, device=device) if uniforms is None else uniforms
    # The captions that the decoder still reads, and which of these are finished.
    active, finished = torch.arange(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)
    longest = len(constraints.prefix)
    for time in range(longest, max_words):
        logits, state, _ = decoder.step(tokens, state)
        logits = logits.float() if temperature == 1 else logits.float() / temperature
        constraints.mask_logits(logits, sequences[active, :time], max_words)
        tokens, log_probs = _draw(logits, uniforms[active, time], top_k, top_p)
        tokens = tokens.masked_fill(finished, PAD)
        sequences[active, time] = tokens
        totals[active] += log_probs.masked_fill(finished, 0)
        longest, finished = time + 1, finished | (tokens == END)
        unfinished = len(finished) - int(finished.sum())
        if not unfinished:
            break
        if unfinished <= _FEW * len(finished):
            rows = (~finished).nonzero().squeeze(1)
            state = decoder.select(state, rows)
            tokens, active, finished = tokens[rows], active[rows], finished[rows]
    return sequences[:, :longest], totals


def _draw(
    logits: Float[Tensor, "row word"], uniforms: Float[Tensor, "row"], top_k: int | None, top_p: float
) -> tuple[Int[Tensor, "row"], Float[Tensor, "row"]]:
    """Return a word per row, and its log-probability."""
    words = None
    if top_k is not None and top_k < logits.shape[1]:
        logits, words = logits.topk(top_k)
    elif top_p < 1:
        logits, words = logits.sort(descending=True)
    if top_p < 1:
        probs = logits.softmax(1)
        logits = logits.masked_fill(probs.cumsum(1) - probs >= top_p, -torch.inf)
    maxima, likeliest = logits.max(1, keepdim=True)
    cumulative = (logits - maxima).exp_().cumsum_(1)
    total = cumulative[:, -1:]
    indices = torch.searchsorted(cumulative, uniforms.unsqueeze(1) * total, right=True)
    indices.clamp_(max=logits.shape[1] - 1)
    # A cumulative sum may decrease by a rounding error, at a word of probability zero.
    indices = torch.where(logits.gather(1, indices) > -torch.inf, indices, likeliest)
    log_probs = logits.gather(1, indices) - maxima - total.log()
    tokens = indices if words is None else words.gather(1, indices)
    return tokens.squeeze(1), log_probs.squeeze(1)
