"""Find the captions that a decoder thinks likely; written once against `start` and `step`."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from captionscale.model.decoders import AttentionDecoder, PlainDecoder, select
from captionscale.vocab import END, PAD, START, UNKNOWN


@dataclass(frozen=True)
class Found:
    """A caption that a search found."""

    tokens: list[int]
    """Words, then the end token unless the search ended before it."""
    log_probability: float
    """Natural logarithm of the probability that the decoder gives to these tokens."""

    def score(self, length_power: float) -> float:
        """Return what captions of one picture are ranked by: log-probability / tokens**length_power."""
        return self.log_probability / math.pow(max(len(self.tokens), 1), length_power)


@torch.no_grad()
def search(
    decoder: PlainDecoder | AttentionDecoder,
    features: Float[Tensor, "image region feature"],
    *,
    beam: int,
    max_words: int,
    length_power: float,
) -> list[list[Found]]:
    """Return the captions that a beam search ends with, for each picture, best first.

    A beam of one is greedy search. A finished caption stays in the beam, where longer ones must beat its
    log-probability; an unfinished one is returned as it stands at `max_words`. The special tokens are never
    said, save the end.

    Args:
        decoder: In evaluation mode.
        features: Of each picture.
        beam: Captions kept at each word.
        max_words: Greatest number of words.
        length_power: Of `Found.score`, which ranks the results.

    Source:
        Length normalisation as in Wu et al. 2016 (arXiv:1609.08144), section 7, in its plain form.
    """
    images, device = len(features), features.device
    first_row = torch.arange(images, device=device).unsqueeze(1) * beam
    rows = torch.arange(images, device=device).repeat_interleave(beam)
    state = select(decoder.start(features), rows)
    tokens = torch.full((images * beam,), START, device=device)
    totals = torch.full((images, beam), -torch.inf, device=device)
    totals[:, 0] = 0
    said = torch.empty((images * beam, 0), dtype=torch.long, device=device)
    finished = torch.zeros(images * beam, dtype=torch.bool, device=device)
    for _ in range(max_words):
        logits, state, _ = decoder.step(tokens, state)  # type: ignore[arg-type]
        chances = logits.float().log_softmax(1)
        chances[:, [PAD, START, UNKNOWN]] = -torch.inf
        chances[finished] = -torch.inf
        chances[finished, PAD] = 0
        candidates = (totals.unsqueeze(2) + chances.view(images, beam, -1)).flatten(1)
        totals, picks = candidates.topk(beam)
        rows = (first_row + picks // chances.shape[1]).flatten()
        tokens = (picks % chances.shape[1]).flatten()
        state = select(state, rows)
        said = torch.cat([said[rows], tokens.unsqueeze(1)], 1)
        finished = finished[rows] | (tokens == END)
        if finished.all():
            break
    return _ranked(said.view(images, beam, -1).tolist(), totals.tolist(), length_power)


def _ranked(said: list[list[list[int]]], totals: list[list[float]], length_power: float) -> list[list[Found]]:
    found = [
        [
            Found([token for token in tokens if token != PAD], total)
            for tokens, total in zip(captions, scores, strict=True)
            if total > -torch.inf
        ]
        for captions, scores in zip(said, totals, strict=True)
    ]
    return [sorted(captions, key=lambda caption: -caption.score(length_power)) for captions in found]
