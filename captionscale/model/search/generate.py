"""Greedy and beam search over a decoder's `start`, `step` and `select`."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from captionscale.model.decoders.decoder import StepDecoder, select
from captionscale.model.search.beam import Beam, BeamLayout, best_candidates, find_transitions
from captionscale.model.search.constraints import (
    UNCONSTRAINED,
    Constraints,
    Features,
    PrefixState,
    read_prefix,
)
from captionscale.vocab import END, PAD


@dataclass(frozen=True)
class Hypothesis:
    """A caption that a search found."""

    tokens: list[int]
    """Words, then END unless the caption was cut."""
    log_prob: float
    """Log-probability of these tokens."""

    def score(self, length_penalty: float) -> float:
        """Return log-probability / tokens**length_penalty, which ranks the captions of an image."""
        return self.log_prob / math.pow(max(len(self.tokens), 1), length_penalty)


@torch.no_grad()
def search(
    decoder: StepDecoder,
    features: Features,
    *,
    beam: int,
    max_words: int,
    length_penalty: float,
    groups: int = 1,
    diversity_penalty: float = 0.0,
    constraints: Constraints = UNCONSTRAINED,
) -> list[list[Hypothesis]]:
    """Return the captions that beam search finds for each image, best first.

    A beam of one is greedy search. Finished captions stay in the beam until longer ones exceed their
    log-probability; captions unfinished at `max_words` are cut there. The decoder reads neither finished
    captions nor images whose results are certain.

    Args:
        decoder: In evaluation mode.
        features: Features of each image.
        beam: Captions kept per step; with required words, per set of those already generated.
        max_words: Maximum number of words.
        length_penalty: Exponent of `Hypothesis.score`, which ranks the results.
        groups: Equal parts of the beam that choose their words one after another.
        diversity_penalty: Subtracted from a group's score of a token for each caption of an earlier group
            that has it at the same step.
        constraints: What captions must not and must contain.

    Source:
        Length normalization: Wu et al. 2016 (arXiv:1609.08144), section 7, in its plain form. Groups:
        Vijayakumar et al. 2016, "Diverse Beam Search" (arXiv:1610.02424), algorithm 1 with Hamming diversity.
        Required words: Anderson et al. 2017, "Guided Open Vocabulary Image Captioning with Constrained Beam
        Search" (arXiv:1612.00576), section 3.2; here no caption ends before it has them all.
    """
    if groups < 1 or beam % groups:
        raise ValueError(f"a beam of {beam} cannot be divided among {groups} groups")
    layout = BeamLayout(groups, 2 ** len(constraints.required), beam // groups)
    start = read_prefix(decoder, features, constraints.prefix)
    kept = _first(start, layout, constraints)
    transitions = find_transitions(constraints, layout, kept.tokens.device)
    active = (kept.log_probs > -torch.inf).nonzero().squeeze(1)
    state = decoder.select(start.state, active // layout.slots_per_image)
    for _ in range(len(constraints.prefix), max_words):
        logits, state, _ = decoder.step(kept.tokens[active], state)
        logits = logits.float()
        next_log_probs = logits + (kept.log_probs[active] - logits.logsumexp(1)).unsqueeze(1)
        constraints.mask_logits(next_log_probs, kept.sequences[active], max_words)
        if layout.sets > 1:
            lacking = active % layout.slots_per_group < layout.slots_per_group - layout.width
            next_log_probs[:, END].masked_fill_(lacking, -torch.inf)
        log_probs, slots, tokens = best_candidates(
            next_log_probs, active, kept, layout, diversity_penalty, transitions
        )
        kept = select(kept, slots)
        kept = kept._replace(
            tokens=tokens,
            sequences=torch.cat([kept.sequences, tokens.unsqueeze(1)], 1),
            log_probs=log_probs,
            finished=kept.finished | (tokens == END),
        )
        undecided = ~_decided(kept, layout)
        unfinished = ~kept.finished & (log_probs > -torch.inf)
        unfinished &= undecided.repeat_interleave(layout.slots_per_image)
        before, active = active, unfinished.nonzero().squeeze(1)
        if not len(active):
            break
        if layout.slots_per_image == 1 and len(active) == len(before):
            # Greedy captions stay where they are.
            continue
        rows = torch.empty_like(slots)
        rows[before] = torch.arange(len(before), device=rows.device)
        state = decoder.select(state, rows[slots[active]])
    return _hypotheses(kept, layout, length_penalty)


def _first(start: PrefixState, layout: BeamLayout, constraints: Constraints) -> Beam:
    """Return the beam before the first step."""
    count, device = len(start.tokens), start.tokens.device
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    beam = Beam(start.tokens, start.sequences, start.log_probs, finished)
    beam = select(beam, torch.arange(count, device=device).repeat_interleave(layout.slots_per_image))
    # One caption per group: equal ones would stay equal.
    alone = torch.full((count, *layout), -torch.inf, device=device)
    alone[:, :, constraints.satisfied(*constraints.prefix), 0] = 0
    return beam._replace(log_probs=beam.log_probs + alone.flatten())


def _decided(beam: Beam, layout: BeamLayout) -> Bool[Tensor, "image"]:
    """Return the images whose unfinished captions can no longer be among the results."""
    active = beam.log_probs.masked_fill(beam.finished, -torch.inf)
    active = active.view(-1, layout.groups, layout.slots_per_group)
    settled = layout.completed(beam.log_probs.masked_fill(~beam.finished, -torch.inf))
    return (active.amax(2) <= settled.amin(2)).all(1)


def _hypotheses(beam: Beam, layout: BeamLayout, length_penalty: float) -> list[list[Hypothesis]]:
    """Return the captions of each image that have all required words, best first."""
    log_probs = layout.completed(beam.log_probs).flatten(1).tolist()
    sequences = beam.sequences.view(-1, *layout, beam.sequences.shape[1])[:, :, -1].flatten(1, 2).tolist()
    found = []
    for captions, totals in zip(sequences, log_probs, strict=True):
        # Groups may find the same caption.
        each = {
            tuple(tokens): Hypothesis([token for token in tokens if token != PAD], total)
            for tokens, total in zip(captions, totals, strict=True)
            if total > -math.inf
        }
        found.append(sorted(each.values(), key=lambda caption: -caption.score(length_penalty)))
    return found
