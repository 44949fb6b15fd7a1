"""Find the captions that a decoder thinks likely; written once against `start` and `step`."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from captionscale.errors import UserError
from captionscale.model.decoders.registry import Decoder
from captionscale.model.decoders.state import select
from captionscale.model.search.beam import Beam, BeamLayout, best_candidates, transitions
from captionscale.model.search.constraints import (
    UNCONSTRAINED,
    Constraints,
    Features,
    PrefixState,
    read_prefix,
)
from captionscale.vocab import END, PAD

_CACHED_ROWS = 16


@dataclass(frozen=True)
class Hypothesis:
    """A caption that a search found."""

    tokens: list[int]
    """Words, then the end token unless the search ended before it."""
    log_prob: float
    """Natural logarithm of the probability that the decoder gives to these tokens."""
    coverage_penalty: float = 0.0
    """What a ranking with coverage adds: 0 for having looked at all regions, less for some only."""

    def score(self, length_penalty: float) -> float:
        """Return what captions of one image are ranked by: log-probability / tokens**length_penalty."""
        return self.log_prob / math.pow(max(len(self.tokens), 1), length_penalty) + self.coverage_penalty


@torch.no_grad()
def search(
    decoder: Decoder,
    features: Features,
    *,
    beam: int,
    max_words: int,
    length_penalty: float,
    groups: int = 1,
    diversity_penalty: float = 0.0,
    coverage_weight: float = 0.0,
    constraints: Constraints = UNCONSTRAINED,
) -> list[list[Hypothesis]]:
    """Return the captions that a beam search ends with, for each image, best first.

    A beam of one is greedy search. A finished caption stays in the beam, where longer ones must beat its
    log-probability; an unfinished one is returned as it stands at `max_words`. The decoder reads no caption
    that is finished, and none of an image whose results are certain.

    Args:
        decoder: In evaluation mode.
        features: Of each image.
        beam: Captions kept at each word; with required words, for each set of those that are said already.
        max_words: Greatest number of words.
        length_penalty: Of `Hypothesis.score`, which ranks the results.
        groups: Equal parts of the beam that choose their words one after another.
        diversity_penalty: What a word costs a group, for choosing only, for each caption of an earlier group that
            says it at the same place.
        coverage_weight: Weight of `Hypothesis.coverage_penalty` in the ranking.
        constraints: What may be said, and what must.

    Raises:
        UserError: Coverage is asked of a decoder without attention.

    Source:
        Length normalisation as in Wu et al. 2016 (arXiv:1609.08144), section 7, in its plain form, and
        coverage as in its equation 14. Groups: Vijayakumar et al. 2016, "Diverse Beam Search"
        (arXiv:1610.02424), algorithm 1 with Hamming diversity. Required words: Anderson et al. 2017, "Guided
        Open Vocabulary Image Captioning with Constrained Beam Search" (arXiv:1612.00576), section 3.2; here
        a caption does not end before it has them all.
    """
    if groups < 1 or beam % groups:
        raise ValueError(f"a beam of {beam} cannot be divided among {groups} groups")
    layout = BeamLayout(groups, 2 ** len(constraints.required), beam // groups)
    begun = read_prefix(decoder, features, constraints.prefix)
    kept = _first(begun, layout, constraints)
    ways = transitions(constraints, layout, kept.tokens.device)
    active = (kept.log_probs > -torch.inf).nonzero().squeeze(1)
    state = select(begun.state, active // layout.slots_per_image)
    for _ in range(len(constraints.prefix), max_words):
        logits, state, attention = decoder.step(kept.tokens[active], state)
        next_log_probs = _add(kept.log_probs[active], logits)
        constraints.mask_logits(next_log_probs, kept.sequences[active], max_words)
        if layout.sets > 1:
            lacking = active % layout.slots_per_group < layout.slots_per_group - layout.width
            next_log_probs[:, END].masked_fill_(lacking, -torch.inf)
        log_probs, slots, tokens = best_candidates(
            next_log_probs, active, kept, layout, diversity_penalty, ways
        )
        attention_sum = kept.attention_sum
        if coverage_weight:
            seen = _attended(attention)
            attention_sum = (attention_sum + attention_sum.new_zeros(1, seen.shape[1])).index_add_(
                0, active, seen
            )
        kept = select(kept._replace(attention_sum=attention_sum), slots)
        kept = kept._replace(
            tokens=tokens,
            sequences=torch.cat([kept.sequences, tokens.unsqueeze(1)], 1),
            log_probs=log_probs,
            finished=kept.finished | (tokens == END),
        )
        undecided = ~_decided(kept, layout)
        unfinished = ~kept.finished & (log_probs > -torch.inf)
        before, active = (
            active,
            (unfinished & undecided.repeat_interleave(layout.slots_per_image)).nonzero().squeeze(1),
        )
        if not len(active):
            break
        if layout.slots_per_image == 1 and len(active) == len(before):
            # Greedy captions that all go on stay where they are.
            continue
        rows = torch.empty_like(slots)
        rows[before] = torch.arange(len(before), device=rows.device)
        state = select(state, rows[slots[active]])
    return _read(kept, layout, length_penalty, coverage_weight)


def _first(begun: PrefixState, layout: BeamLayout, constraints: Constraints) -> Beam:
    """Return the beam before the first word that is searched for."""
    count, device = len(begun.tokens), begun.tokens.device
    attention_sum = sum(begun.attentions, start=torch.zeros(count, 1, device=device))
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    beam = Beam(begun.tokens, begun.sequences, begun.log_prob, finished, attention_sum)
    beam = select(beam, torch.arange(count, device=device).repeat_interleave(layout.slots_per_image))
    # One caption for each group: were there equal ones, they would stay equal.
    alone = torch.full((count, *layout), -torch.inf, device=device)
    alone[:, :, constraints.satisfied(*constraints.prefix), 0] = 0
    return beam._replace(log_probs=beam.log_probs + alone.flatten())


def _add(log_probs: Float[Tensor, "row"], logits: Float[Tensor, "row word"]) -> Float[Tensor, "row word"]:
    """Return the log-probability of each caption with each word, in the logits' memory if they are fp32."""
    logits = logits.float()
    # On a CPU, a few rows at a time: their exponentials stay in its cache.
    some = _CACHED_ROWS if logits.is_cpu else len(logits)
    masses = torch.cat([rows.logsumexp(1) for rows in torch.split(logits, some)])
    return logits.add_((log_probs - masses).unsqueeze(1))


def _attended(attention: Float[Tensor, "row region"] | None) -> Float[Tensor, "row region"]:
    if attention is None:
        raise UserError(
            "search.coverage_weight is above 0, but this model has no attention that could cover an image (an"
            " ensemble has none either); set search.coverage_weight=0"
        )
    return attention.float()


def _decided(beam: Beam, layout: BeamLayout) -> Bool[Tensor, "image"]:
    """Return of which images no unfinished caption can come to be among the found ones any more."""
    active = beam.log_probs.masked_fill(beam.finished, -torch.inf).view(
        -1, layout.groups, layout.slots_per_group
    )
    settled = layout.completed(beam.log_probs.masked_fill(~beam.finished, -torch.inf))
    return (active.amax(2) <= settled.amin(2)).all(1)


def _covered(beam: Beam, coverage_weight: float) -> Float[Tensor, "slot"]:
    smallest = torch.finfo(beam.attention_sum.dtype).tiny
    return coverage_weight * beam.attention_sum.clamp(smallest, 1).log().sum(1)


def _read(
    beam: Beam, layout: BeamLayout, length_penalty: float, coverage_weight: float
) -> list[list[Hypothesis]]:
    """Return the captions of each image that have all required words, best first."""
    fields = (beam.log_probs, _covered(beam, coverage_weight))
    log_probs, covers = (layout.completed(values).flatten(1).tolist() for values in fields)
    sequences = beam.sequences.view(-1, *layout, beam.sequences.shape[1])[:, :, -1].flatten(1, 2).tolist()
    found = []
    for captions in zip(sequences, log_probs, covers, strict=True):
        each = {
            tuple(tokens): Hypothesis([token for token in tokens if token != PAD], total, cover)
            for tokens, total, cover in zip(*captions, strict=True)
            if total > -math.inf
        }
        # Groups may have found the same one.
        found.append(sorted(each.values(), key=lambda caption: -caption.score(length_penalty)))
    return found
