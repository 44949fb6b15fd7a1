"""Find the captions that a decoder thinks likely; written once against `start` and `step`."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from captionscale.errors import UserError
from captionscale.model.decoders.registry import Decoder
from captionscale.model.decoders.state import select
from captionscale.model.search.beam import Beam, Places, choose, entries
from captionscale.model.search.constraints import FREE, Features, Rules, Start, start
from captionscale.vocab import END, PAD

_CACHED_ROWS = 16


@dataclass(frozen=True)
class Found:
    """A caption that a search found."""

    tokens: list[int]
    """Words, then the end token unless the search ended before it."""
    log_prob: float
    """Natural logarithm of the probability that the decoder gives to these tokens."""
    covered: float = 0.0
    """What a ranking with coverage adds: 0 for having looked at all regions, less for some only."""

    def score(self, length_power: float) -> float:
        """Return what captions of one picture are ranked by: log-probability / tokens**length_power."""
        return self.log_prob / math.pow(max(len(self.tokens), 1), length_power) + self.covered


@torch.no_grad()
def search(
    decoder: Decoder,
    features: Features,
    *,
    beam: int,
    max_words: int,
    length_power: float,
    groups: int = 1,
    diversity: float = 0.0,
    coverage: float = 0.0,
    rules: Rules = FREE,
) -> list[list[Found]]:
    """Return the captions that a beam search ends with, for each picture, best first.

    A beam of one is greedy search. A finished caption stays in the beam, where longer ones must beat its
    log-probability; an unfinished one is returned as it stands at `max_words`. The decoder reads no caption
    that is finished, and none of a picture whose results are certain.

    Args:
        decoder: In evaluation mode.
        features: Of each picture.
        beam: Captions kept at each word; with required words, for each set of those that are said already.
        max_words: Greatest number of words.
        length_power: Of `Found.score`, which ranks the results.
        groups: Equal parts of the beam that choose their words one after another.
        diversity: What a word costs a group, for choosing only, for each caption of an earlier group that
            says it at the same place.
        coverage: Weight of `Found.covered` in the ranking.
        rules: What may be said, and what must.

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
    places = Places(groups, 2 ** len(rules.required), beam // groups)
    begun = start(decoder, features, rules.prefix)
    kept = _first(begun, places, rules)
    ways = entries(rules, places, kept.tokens.device)
    going = (kept.totals > -torch.inf).nonzero().squeeze(1)
    state = select(begun.state, going // places.slots)
    for _ in range(len(rules.prefix), max_words):
        logits, state, attention = decoder.step(kept.tokens[going], state)
        chances = _add(kept.totals[going], logits)
        rules.forbid(chances, kept.said[going], max_words)
        if places.sets > 1:
            lacking = going % places.own < places.own - places.width
            chances[:, END].masked_fill_(lacking, -torch.inf)
        totals, slots, tokens = choose(chances, going, kept, places, diversity, ways)
        looks = kept.looks
        if coverage:
            seen = _attended(attention)
            looks = (looks + looks.new_zeros(1, seen.shape[1])).index_add_(0, going, seen)
        kept = select(kept._replace(looks=looks), slots)
        kept = kept._replace(
            tokens=tokens,
            said=torch.cat([kept.said, tokens.unsqueeze(1)], 1),
            totals=totals,
            finished=kept.finished | (tokens == END),
        )
        undecided = ~_decided(kept, places)
        unfinished = ~kept.finished & (totals > -torch.inf)
        before, going = going, (unfinished & undecided.repeat_interleave(places.slots)).nonzero().squeeze(1)
        if not len(going):
            break
        if places.slots == 1 and len(going) == len(before):
            # Greedy captions that all go on stay where they are.
            continue
        rows = torch.empty_like(slots)
        rows[before] = torch.arange(len(before), device=rows.device)
        state = select(state, rows[slots[going]])
    return _read(kept, places, length_power, coverage)


def _first(begun: Start, places: Places, rules: Rules) -> Beam:
    """Return the beam before the first word that is searched for."""
    count, device = len(begun.tokens), begun.tokens.device
    looks = sum(begun.looks, start=torch.zeros(count, 1, device=device))
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    beam = Beam(begun.tokens, begun.said, begun.log_prob, finished, looks)
    beam = select(beam, torch.arange(count, device=device).repeat_interleave(places.slots))
    # One caption for each group: were there equal ones, they would stay equal.
    alone = torch.full((count, *places), -torch.inf, device=device)
    alone[:, :, rules.met(*rules.prefix), 0] = 0
    return beam._replace(totals=beam.totals + alone.flatten())


def _add(totals: Float[Tensor, "row"], logits: Float[Tensor, "row word"]) -> Float[Tensor, "row word"]:
    """Return the log-probability of each caption with each word, in the logits' memory if they are fp32."""
    logits = logits.float()
    # On a CPU, a few rows at a time: their exponentials stay in its cache.
    some = _CACHED_ROWS if logits.is_cpu else len(logits)
    masses = torch.cat([rows.logsumexp(1) for rows in torch.split(logits, some)])
    return logits.add_((totals - masses).unsqueeze(1))


def _attended(attention: Float[Tensor, "row region"] | None) -> Float[Tensor, "row region"]:
    if attention is None:
        raise UserError(
            "search.coverage is above 0, but this model has no attention that could cover a picture (an"
            " ensemble has none either); set search.coverage=0"
        )
    return attention.float()


def _decided(beam: Beam, places: Places) -> Bool[Tensor, "picture"]:
    """Return of which pictures no unfinished caption can come to be among the found ones any more."""
    going = beam.totals.masked_fill(beam.finished, -torch.inf).view(-1, places.groups, places.own)
    settled = places.last_sets(beam.totals.masked_fill(~beam.finished, -torch.inf))
    return (going.amax(2) <= settled.amin(2)).all(1)


def _covered(beam: Beam, coverage: float) -> Float[Tensor, "slot"]:
    smallest = torch.finfo(beam.looks.dtype).tiny
    return coverage * beam.looks.clamp(smallest, 1).log().sum(1)


def _read(beam: Beam, places: Places, length_power: float, coverage: float) -> list[list[Found]]:
    """Return the captions of each picture that have all required words, best first."""
    fields = (beam.totals, _covered(beam, coverage))
    totals, covers = (places.last_sets(values).flatten(1).tolist() for values in fields)
    said = beam.said.view(-1, *places, beam.said.shape[1])[:, :, -1].flatten(1, 2).tolist()
    found = []
    for captions in zip(said, totals, covers, strict=True):
        each = {
            tuple(tokens): Found([token for token in tokens if token != PAD], total, cover)
            for tokens, total, cover in zip(*captions, strict=True)
            if total > -math.inf
        }
        # Groups may have found the same one.
        found.append(sorted(each.values(), key=lambda caption: -caption.score(length_power)))
    return found
