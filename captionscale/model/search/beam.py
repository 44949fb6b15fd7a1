"""Which captions a beam keeps at each word."""

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from captionscale.model.search.constraints import Rules
from captionscale.vocab import PAD, START

# Words that are looked at together.
_BLOCK = 64

Entries: TypeAlias = tuple[Int[Tensor, "set entry"], Int[Tensor, "set entry"]]
"""How captions come to a set of required words by saying one: the slots of a group, and the words."""


class Beam(NamedTuple):
    """Captions under way: a slot each, those of a picture side by side."""

    tokens: Int[Tensor, "slot"]
    said: Int[Tensor, "slot time"]
    totals: Float[Tensor, "slot"]
    """Log-probabilities; minus infinity: there is no such caption yet."""
    finished: Bool[Tensor, "slot"]
    looks: Float[Tensor, "slot region"]
    """How much each region was looked at so far; one zero before any look."""


class Places(NamedTuple):
    """How a picture's slots are dealt out: to each group, to each set of required words, some."""

    groups: int
    sets: int
    width: int

    @property
    def slots(self) -> int:
        """Of a picture."""
        return self.groups * self.own

    @property
    def own(self) -> int:
        """Slots of a group."""
        return self.sets * self.width

    def last_sets(self, values: Float[Tensor, "slot"]) -> Float[Tensor, "picture group width"]:
        """Return the values of captions that have all required words."""
        return values.view(-1, *self)[:, :, -1]


def entries(rules: Rules, places: Places, device: torch.device) -> Entries | None:
    """Return how captions come to each set of required words; nothing if there are none.

    Lists that are shorter than the longest are filled up with the start, which nothing says.
    """
    if places.sets == 1:
        return None
    ways: list[list[tuple[int, int]]] = [[] for _ in range(places.sets)]
    for before in range(places.sets):
        for token in sorted({token for group in rules.required for token in group}):
            after = before | rules.met(token)
            if after != before:
                ways[after] += [(before * places.width + slot, token) for slot in range(places.width)]
    longest = max(map(len, ways))
    filled = [each + [(0, START)] * (longest - len(each)) for each in ways]
    slots, words = torch.tensor(filled, device=device).unbind(2)
    return slots, words


def choose(
    chances: Float[Tensor, "row word"],
    going: Int[Tensor, "row"],
    kept: Beam,
    places: Places,
    diversity: float,
    entries: Entries | None,
) -> tuple[Float[Tensor, "slot"], Int[Tensor, "slot"], Int[Tensor, "slot"]]:
    """Return what is kept of all captions longer by a word: log-probability, slot it was in, and word.

    Args:
        chances: Log-probability of each caption that goes on, with each word.
        going: The slots of these.
        kept: All captions; the finished ones may stay.
        places: Of the slots.
        diversity: As `search` has it.
        entries: As `entries` gives them.
    """
    firsts = torch.arange(0, len(kept.totals), places.slots, device=going.device).unsqueeze(1)
    price = chances.new_zeros(len(firsts), chances.shape[1])
    row_of = torch.zeros_like(kept.tokens).index_copy(0, going, torch.arange(len(going), device=going.device))
    parts = []
    for group in range(places.groups):
        own = firsts + torch.arange(group * places.own, (group + 1) * places.own, device=going.device)
        scores, rows = chances, going
        if places.groups > 1:
            mine = (going // places.own % places.groups == group).nonzero().squeeze(1)
            rows = going[mine]
            scores = chances[mine] - price[rows // places.slots]
        totals, chosen, words = _best(scores, rows, own, kept, places, entries)
        slots = own.gather(1, chosen)
        if group:
            paid = torch.where(kept.finished[slots], kept.totals[slots], chances[row_of[slots], words])
            totals = paid.masked_fill(totals == -torch.inf, -torch.inf)
        if group < places.groups - 1:
            spoken = (totals > -torch.inf) & (words != PAD)
            price.scatter_add_(1, words, diversity * spoken)
        parts.append((totals, slots, words))
    totals, slots, words = (torch.stack(part, 1).flatten() for part in zip(*parts, strict=True))
    return totals, slots, words


def _best(
    scores: Float[Tensor, "row word"],
    rows: Int[Tensor, "row"],
    own: Int[Tensor, "picture slot"],
    kept: Beam,
    places: Places,
    entries: Entries | None,
) -> tuple[Float[Tensor, "picture kept"], Int[Tensor, "picture kept"], Int[Tensor, "picture kept"]]:
    """Return the best captions of a group, the same number for each set of required words.

    Args:
        scores: Of each caption of the group that goes on, with each word.
        rows: The slots of these.
        own: All slots of the group.
        kept: All captions.
        places: Of the slots.
        entries: As `entries` gives them.

    Returns:
        Their scores, which of the group's slots they were in, and their last words.
    """
    if entries is not None:
        # Only by these ways does a caption change its set; by all other words it stays where it is.
        nothing = scores.new_full((1, scores.shape[1]), -torch.inf)
        row_of = torch.full_like(kept.tokens, len(rows))
        row_of[rows] = torch.arange(len(rows), device=rows.device)
        by = row_of[own[:, entries[0]]], entries[1].expand(len(own), -1, -1)
        scores = torch.cat([scores, nothing])
        coming, scores = scores[by], scores.index_put(by, nothing[0, 0])[:-1]
    # Of the captions in a slot only so many can be kept.
    values, words = _top(scores, min(places.width, scores.shape[1]))
    likely = values.new_full((len(kept.totals), values.shape[1]), -torch.inf)
    likely[:, 0] = kept.totals.masked_fill(~kept.finished, -torch.inf)
    likely[rows] = values
    said = torch.full_like(likely, PAD, dtype=torch.long)
    said[rows] = words
    values, chosen = likely[own].view(len(own), places.sets, -1).topk(places.width)
    words = said[own].view(len(own), places.sets, -1).gather(2, chosen)
    first = torch.arange(0, places.own, places.width, device=rows.device).unsqueeze(1)
    slots = first + chosen // likely.shape[1]
    if entries is not None:
        values, order = torch.cat([values, coming], 2).topk(places.width)
        slots, words = (
            torch.cat([stayed, came.expand(len(own), -1, -1)], 2).gather(2, order)
            for stayed, came in zip((slots, words), entries, strict=True)
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
