"""One step of beam search: which captions are kept."""

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from captionscale.model.search.constraints import Constraints
from captionscale.vocab import PAD, START

Transitions: TypeAlias = tuple[Int[Tensor, "set entry"], Int[Tensor, "set entry"]]
"""Slots of a group, and tokens that lead from there to each set of required groups."""


class Beam(NamedTuple):
    """Partial and finished captions, one per slot; those of an image are adjacent."""

    tokens: Int[Tensor, "slot"]
    sequences: Int[Tensor, "slot time"]
    log_probs: Float[Tensor, "slot"]
    """Minus infinity: an empty slot."""
    finished: Bool[Tensor, "slot"]


class BeamLayout(NamedTuple):
    """The slots of an image: `width` for each set of required groups, in each group of diverse search."""

    groups: int
    sets: int
    width: int

    @property
    def slots_per_image(self) -> int:
        """Slots of an image."""
        return self.groups * self.slots_per_group

    @property
    def slots_per_group(self) -> int:
        """Slots of a group."""
        return self.sets * self.width

    def completed(self, values: Float[Tensor, "slot"]) -> Float[Tensor, "image group width"]:
        """Return the values of captions with all required words."""
        return values.view(-1, *self)[:, :, -1]


def find_transitions(
    constraints: Constraints, layout: BeamLayout, device: torch.device
) -> Transitions | None:
    """Return the transitions to each set of required groups, padded with START, which is never generated."""
    if layout.sets == 1:
        return None
    paths: list[list[tuple[int, int]]] = [[] for _ in range(layout.sets)]
    for before in range(layout.sets):
        for token in sorted({token for group in constraints.required for token in group}):
            after = before | constraints.satisfied(token)
            if after != before:
                paths[after] += [(before * layout.width + slot, token) for slot in range(layout.width)]
    longest = max(map(len, paths))
    filled = [each + [(0, START)] * (longest - len(each)) for each in paths]
    slots, words = torch.tensor(filled, device=device).unbind(2)
    return slots, words


def best_candidates(
    next_log_probs: Float[Tensor, "row word"],
    active: Int[Tensor, "row"],
    kept: Beam,
    layout: BeamLayout,
    diversity_penalty: float,
    transitions: Transitions | None,
) -> tuple[Float[Tensor, "slot"], Int[Tensor, "slot"], Int[Tensor, "slot"]]:
    """Return the log-probability, previous slot and next token of the captions to keep.

    Of each caption in the slots `active`, `next_log_probs` has the log-probability with each next token.
    Finished captions compete as they are.
    """
    firsts = torch.arange(0, len(kept.log_probs), layout.slots_per_image, device=active.device).unsqueeze(1)
    penalty = next_log_probs.new_zeros(len(firsts), next_log_probs.shape[1])
    row_of = torch.zeros_like(kept.tokens).index_copy(
        0, active, torch.arange(len(active), device=active.device)
    )
    parts = []
    for group in range(layout.groups):
        own = firsts + torch.arange(
            group * layout.slots_per_group, (group + 1) * layout.slots_per_group, device=active.device
        )
        scores, rows = next_log_probs, active
        if layout.groups > 1:
            members = (active // layout.slots_per_group % layout.groups == group).nonzero().squeeze(1)
            rows = active[members]
            scores = next_log_probs[members] - penalty[rows // layout.slots_per_image]
        log_probs, chosen, words = _best(scores, rows, own, kept, layout, transitions)
        slots = own.gather(1, chosen)
        if group:
            unpenalized = torch.where(
                kept.finished[slots], kept.log_probs[slots], next_log_probs[row_of[slots], words]
            )
            log_probs = unpenalized.masked_fill(log_probs == -torch.inf, -torch.inf)
        if group < layout.groups - 1:
            chosen_words = (log_probs > -torch.inf) & (words != PAD)
            penalty.scatter_add_(1, words, diversity_penalty * chosen_words)
        parts.append((log_probs, slots, words))
    log_probs, slots, words = (torch.stack(part, 1).flatten() for part in zip(*parts, strict=True))
    return log_probs, slots, words


def _best(
    scores: Float[Tensor, "row word"],
    rows: Int[Tensor, "row"],
    own: Int[Tensor, "image slot"],
    kept: Beam,
    layout: BeamLayout,
    transitions: Transitions | None,
) -> tuple[Float[Tensor, "image kept"], Int[Tensor, "image kept"], Int[Tensor, "image kept"]]:
    """Return the best captions of a group, equally many per set of required groups: score, slot, token."""
    if transitions is not None:
        # Only transitions change a caption's set.
        nothing = scores.new_full((1, scores.shape[1]), -torch.inf)
        row_of = torch.full_like(kept.tokens, len(rows))
        row_of[rows] = torch.arange(len(rows), device=rows.device)
        by = row_of[own[:, transitions[0]]], transitions[1].expand(len(own), -1, -1)
        scores = torch.cat([scores, nothing])
        entering, scores = scores[by], scores.index_put(by, nothing[0, 0])[:-1]
    values, words = scores.topk(min(layout.width, scores.shape[1]))
    likely = values.new_full((len(kept.log_probs), values.shape[1]), -torch.inf)
    likely[:, 0] = kept.log_probs.masked_fill(~kept.finished, -torch.inf)
    likely[rows] = values
    likely_words = torch.full_like(likely, PAD, dtype=torch.long)
    likely_words[rows] = words
    values, chosen = likely[own].view(len(own), layout.sets, -1).topk(layout.width)
    words = likely_words[own].view(len(own), layout.sets, -1).gather(2, chosen)
    first = torch.arange(0, layout.slots_per_group, layout.width, device=rows.device).unsqueeze(1)
    slots = first + chosen // likely.shape[1]
    if transitions is not None:
        values, order = torch.cat([values, entering], 2).topk(layout.width)
        slots, words = (
            torch.cat([staying, new.expand(len(own), -1, -1)], 2).gather(2, order)
            for staying, new in zip((slots, words), transitions, strict=True)
        )
    return values.flatten(1), slots.flatten(1), words.flatten(1)
