"""Which captions a beam keeps at each word."""

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from captionscale.model.search.constraints import Constraints
from captionscale.vocab import PAD, START

# Words that are looked at together.
_BLOCK = 64

Transitions: TypeAlias = tuple[Int[Tensor, "set entry"], Int[Tensor, "set entry"]]
"""How captions come to a set of required words by saying one: the slots of a group, and the words."""


class Beam(NamedTuple):
    """Captions under way: a slot each, those of an image side by side."""

    tokens: Int[Tensor, "slot"]
    sequences: Int[Tensor, "slot time"]
    log_probs: Float[Tensor, "slot"]
    """Log-probabilities; minus infinity: there is no such caption yet."""
    finished: Bool[Tensor, "slot"]
    attention_sum: Float[Tensor, "slot region"]
    """How much each region was looked at so far; one zero before any look."""


class BeamLayout(NamedTuple):
    """How an image's slots are dealt out: to each group, to each set of required words, some."""

    groups: int
    sets: int
    width: int

    @property
    def slots_per_image(self) -> int:
        """Of an image."""
        return self.groups * self.slots_per_group

    @property
    def slots_per_group(self) -> int:
        """Slots of a group."""
        return self.sets * self.width

    def completed(self, values: Float[Tensor, "slot"]) -> Float[Tensor, "image group width"]:
        """Return the values of captions that have all required words."""
        return values.view(-1, *self)[:, :, -1]


def transitions(constraints: Constraints, layout: BeamLayout, device: torch.device) -> Transitions | None:
    """Return how captions come to each set of required words; nothing if there are none.

    Lists that are shorter than the longest are filled up with the start, which nothing says.
    """
    if layout.sets == 1:
        return None
    ways: list[list[tuple[int, int]]] = [[] for _ in range(layout.sets)]
    for before in range(layout.sets):
        for token in sorted({token for group in constraints.required for token in group}):
            after = before | constraints.satisfied(token)
            if after != before:
                ways[after] += [(before * layout.width + slot, token) for slot in range(layout.width)]
    longest = max(map(len, ways))
    filled = [each + [(0, START)] * (longest - len(each)) for each in ways]
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
    """Return what is kept of all captions longer by a word: log-probability, slot it was in, and word.

    Args:
        next_log_probs: Log-probability of each caption that goes on, with each word.
        active: The slots of these.
        kept: All captions; the finished ones may stay.
        layout: Of the slots.
        diversity_penalty: As `search` has it.
        transitions: As `transitions` gives them.
    """
    firsts = torch.arange(0, len(kept.log_probs), layout.slots_per_image, device=active.device).unsqueeze(1)
    price = next_log_probs.new_zeros(len(firsts), next_log_probs.shape[1])
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
            mine = (active // layout.slots_per_group % layout.groups == group).nonzero().squeeze(1)
            rows = active[mine]
            scores = next_log_probs[mine] - price[rows // layout.slots_per_image]
        log_probs, chosen, words = _best(scores, rows, own, kept, layout, transitions)
        slots = own.gather(1, chosen)
        if group:
            paid = torch.where(
                kept.finished[slots], kept.log_probs[slots], next_log_probs[row_of[slots], words]
            )
            log_probs = paid.masked_fill(log_probs == -torch.inf, -torch.inf)
        if group < layout.groups - 1:
            spoken = (log_probs > -torch.inf) & (words != PAD)
            price.scatter_add_(1, words, diversity_penalty * spoken)
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
    """Return the best captions of a group, the same number for each set of required words.

    Args:
        scores: Of each caption of the group that goes on, with each word.
        rows: The slots of these.
        own: All slots of the group.
        kept: All captions.
        layout: Of the slots.
        transitions: As `transitions` gives them.

    Returns:
        Their scores, which of the group's slots they were in, and their last words.
    """
    if transitions is not None:
        # Only by these ways does a caption change its set; by all other words it stays where it is.
        nothing = scores.new_full((1, scores.shape[1]), -torch.inf)
        row_of = torch.full_like(kept.tokens, len(rows))
        row_of[rows] = torch.arange(len(rows), device=rows.device)
        by = row_of[own[:, transitions[0]]], transitions[1].expand(len(own), -1, -1)
        scores = torch.cat([scores, nothing])
        coming, scores = scores[by], scores.index_put(by, nothing[0, 0])[:-1]
    # Of the captions in a slot only so many can be kept.
    values, words = _top(scores, min(layout.width, scores.shape[1]))
    likely = values.new_full((len(kept.log_probs), values.shape[1]), -torch.inf)
    likely[:, 0] = kept.log_probs.masked_fill(~kept.finished, -torch.inf)
    likely[rows] = values
    said = torch.full_like(likely, PAD, dtype=torch.long)
    said[rows] = words
    values, chosen = likely[own].view(len(own), layout.sets, -1).topk(layout.width)
    words = said[own].view(len(own), layout.sets, -1).gather(2, chosen)
    first = torch.arange(0, layout.slots_per_group, layout.width, device=rows.device).unsqueeze(1)
    slots = first + chosen // likely.shape[1]
    if transitions is not None:
        values, order = torch.cat([values, coming], 2).topk(layout.width)
        slots, words = (
            torch.cat([stayed, came.expand(len(own), -1, -1)], 2).gather(2, order)
            for stayed, came in zip((slots, words), transitions, strict=True)
        )
    return values.flatten(1), slots.flatten(1), words.flatten(1)


def _top(
    scores: Float[Tensor, "row word"], count: int
) -> tuple[Float[Tensor, "row {count}"], Int[Tensor, "row {count}"]]:
    """Return what `topk` does.

    On a CPU, and of a large vocabulary, in a third of the time: what is best of all is in one of the blocks
    whose own best are the best.
    """
    rows, words = scores.shape
    blocks = words // _BLOCK
    if not scores.is_cpu or blocks < _BLOCK:
        return scores.topk(count)
    _, best = scores[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK).amax(2).topk(min(count, blocks))
    inside = (best.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK)).flatten(1)
    among = torch.cat([inside, torch.arange(blocks * _BLOCK, words).expand(rows, -1)], 1)
    values, places = scores.gather(1, among).topk(count)
    return values, among.gather(1, places)
