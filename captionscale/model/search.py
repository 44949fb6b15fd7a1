"""Find the captions that a decoder thinks likely; written once against `start` and `step`."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from captionscale.errors import UserError
from captionscale.model.decoders import Decoder
from captionscale.model.rules import FREE, Features, Rules, start
from captionscale.model.sampling import FEW
from captionscale.model.state import select
from captionscale.vocab import END, PAD, START


@dataclass(frozen=True)
class Found:
    """A caption that a search found."""

    tokens: list[int]
    """Words, then the end token unless the search ended before it."""
    log_probability: float
    """Natural logarithm of the probability that the decoder gives to these tokens."""
    covered: float = 0.0
    """What a ranking with coverage adds: 0 for having looked at all regions, less for some only."""

    def score(self, length_power: float) -> float:
        """Return what captions of one picture are ranked by: log-probability / tokens**length_power."""
        return self.log_probability / math.pow(max(len(self.tokens), 1), length_power) + self.covered


class _Beam(NamedTuple):
    """Captions under way: a row each, those of a picture side by side."""

    picture: Int[Tensor, "row"]
    state: tuple[Any, ...]
    tokens: Int[Tensor, "row"]
    said: Int[Tensor, "row time"]
    totals: Float[Tensor, "row"]
    """Log-probabilities; minus infinity: there is no such caption yet."""
    finished: Bool[Tensor, "row"]
    looks: Float[Tensor, "row region"]
    """How much each region was looked at so far; one zero before any look."""


class _Places(NamedTuple):
    """How a picture's rows are dealt out: to each group, to each set of required words, some."""

    groups: int
    sets: int
    width: int

    @property
    def rows(self) -> int:
        """Of a picture."""
        return self.groups * self.sets * self.width

    def last_sets(self, values: Float[Tensor, "row"]) -> Float[Tensor, "picture group width"]:
        """Return the values of captions that have all required words."""
        return values.view(-1, *self)[:, :, -1]


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
    log-probability; an unfinished one is returned as it stands at `max_words`.

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
    places = _Places(groups, 2 ** len(rules.required), beam // groups)
    kept = _first(decoder, features, places, rules)
    entries = _entries(rules, places, kept.tokens.device)
    found: dict[int, list[Found]] = {}
    for _ in range(len(rules.prefix), max_words):
        logits, state, attention = decoder.step(kept.tokens, kept.state)
        chances = logits.float().log_softmax(1)
        rules.forbid(chances, kept.said, max_words)
        if places.sets > 1:
            chances.view(-1, *places, chances.shape[1])[:, :, :-1, :, END] = -torch.inf
        chances.masked_fill_(kept.finished.unsqueeze(1), -torch.inf)
        chances[:, PAD].masked_fill_(kept.finished, 0)
        chances += kept.totals.unsqueeze(1)
        totals, rows, tokens = _choose(chances, places, diversity, entries)
        looks = kept.looks
        if coverage:
            looks = looks + _attended(attention).masked_fill(kept.finished.unsqueeze(1), 0)
        kept = kept._replace(state=state, looks=looks)
        if places.rows > 1:
            kept = select(kept, rows)
        said = torch.cat([kept.said, tokens.unsqueeze(1)], 1)
        kept = kept._replace(
            tokens=tokens, said=said, totals=totals, finished=kept.finished | (tokens == END)
        )
        decided = _decided(kept, places)
        undecided = len(decided) - int(decided.sum())
        if not undecided:
            break
        if undecided <= FEW * len(decided):
            decided = decided.repeat_interleave(places.rows)
            aside, rest = (each.nonzero().squeeze(1) for each in (decided, ~decided))
            found |= _read(select(kept, aside), places, length_power, coverage)
            kept = select(kept, rest)
    found |= _read(kept, places, length_power, coverage)
    return [found[picture] for picture in range(len(found))]


def _first(decoder: Decoder, features: Features, places: _Places, rules: Rules) -> _Beam:
    """Return the beam before the first word that is searched for."""
    begun = start(decoder, features, rules.prefix)
    count, device = len(begun.tokens), begun.tokens.device
    looks = sum(begun.looks, start=torch.zeros(count, 1, device=device))
    pictures = torch.arange(count, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    beam = _Beam(pictures, begun.state, begun.tokens, begun.said, begun.log_probability, finished, looks)
    beam = select(beam, pictures.repeat_interleave(places.rows))
    # One caption for each group: were there equal ones, they would stay equal.
    alone = torch.full((count, *places), -torch.inf, device=device)
    alone[:, :, rules.met(*rules.prefix), 0] = 0
    return beam._replace(totals=beam.totals + alone.flatten())


def _attended(attention: Float[Tensor, "row region"] | None) -> Float[Tensor, "row region"]:
    if attention is None:
        raise UserError(
            "search.coverage is above 0, but this model has no attention that could cover a picture (an"
            " ensemble has none either); set search.coverage=0"
        )
    return attention.float()


def _entries(
    rules: Rules, places: _Places, device: torch.device
) -> tuple[Int[Tensor, "set entry"], Int[Tensor, "set entry"]] | None:
    """Return how captions come to a set of required words by saying one: the rows of a group, and the words.

    Lists that are shorter than the longest are filled up with the start, which nothing says.
    """
    if places.sets == 1:
        return None
    ways: list[list[tuple[int, int]]] = [[] for _ in range(places.sets)]
    for before in range(places.sets):
        for token in sorted({token for group in rules.required for token in group}):
            after = before | rules.met(token)
            if after != before:
                ways[after] += [(before * places.width + row, token) for row in range(places.width)]
    longest = max(map(len, ways))
    filled = [each + [(0, START)] * (longest - len(each)) for each in ways]
    rows, words = torch.tensor(filled, device=device).unbind(2)
    return rows, words


def _choose(
    chances: Float[Tensor, "row word"],
    places: _Places,
    diversity: float,
    entries: tuple[Int[Tensor, "set entry"], Int[Tensor, "set entry"]] | None,
) -> tuple[Float[Tensor, "row"], Int[Tensor, "row"], Int[Tensor, "row"]]:
    """Return what is kept of all captions longer by a word: log-probability, row it was in, and word.

    Args:
        chances: Log-probability of each caption with each word.
        places: Of the rows.
        diversity: As `search` has it.
        entries: As `_entries` gives them.
    """
    words = chances.shape[1]
    grouped = chances.view(-1, places.groups, places.sets * places.width, words)
    pictures = len(grouped)
    price = chances.new_zeros(pictures, 1, words)
    totals, picks = [], []
    for group in range(places.groups):
        own = grouped[:, group].flatten(1)
        scores = (grouped[:, group] - price).flatten(1) if group else own
        values, chosen = _best(scores, places, words, entries)
        totals.append(own.gather(1, chosen) if group else values)
        picks.append(chosen)
        if group < places.groups - 1:
            said = chosen % words
            spoken = (totals[-1] > -torch.inf) & (said != PAD)
            price.squeeze(1).scatter_add_(1, said, diversity * spoken)
    chosen = torch.stack(picks, 1)
    first = torch.arange(pictures * places.groups, device=chances.device) * (places.sets * places.width)
    rows = first.view(pictures, -1, 1) + chosen // words
    return torch.stack(totals, 1).flatten(), rows.flatten(), (chosen % words).flatten()


def _best(
    scores: Float[Tensor, "picture candidate"],
    places: _Places,
    words: int,
    entries: tuple[Int[Tensor, "set entry"], Int[Tensor, "set entry"]] | None,
) -> tuple[Float[Tensor, "picture kept"], Int[Tensor, "picture kept"]]:
    """Return the best candidates of a group, the same number for each set of required words."""
    if entries is None:
        return scores.topk(places.width)
    from_rows, by_words = entries
    coming = from_rows * words + by_words
    scores = scores.clone()
    values = scores[:, coming]
    # Only by these ways does a caption change its set; by all other words it stays where it is.
    scores[:, coming] = -torch.inf
    stayed, staying = scores.view(len(scores), places.sets, -1).topk(places.width)
    staying = staying + torch.arange(places.sets, device=scores.device).unsqueeze(1) * places.width * words
    best, order = torch.cat([stayed, values], 2).topk(places.width)
    candidates = torch.cat([staying, coming.expand(len(scores), -1, -1)], 2)
    return best.flatten(1), candidates.gather(2, order).flatten(1)


def _decided(beam: _Beam, places: _Places) -> Bool[Tensor, "picture"]:
    """Return of which pictures no unfinished caption can come to be among the found ones any more."""
    going = beam.totals.masked_fill(beam.finished, -torch.inf).view(
        -1, places.groups, places.sets * places.width
    )
    settled = places.last_sets(beam.totals.masked_fill(~beam.finished, -torch.inf))
    return (going.amax(2) <= settled.amin(2)).all(1)


def _read(beam: _Beam, places: _Places, length_power: float, coverage: float) -> dict[int, list[Found]]:
    """Return the captions of each picture that have all required words, best first."""
    smallest = torch.finfo(beam.looks.dtype).tiny
    covered = coverage * beam.looks.clamp(smallest, 1).log().sum(1)
    fields = (beam.totals, covered)
    totals, covers = (places.last_sets(values).flatten(1).tolist() for values in fields)
    said = beam.said.view(-1, *places, beam.said.shape[1])[:, :, -1].flatten(1, 2).tolist()
    found = {}
    for picture, *captions in zip(beam.picture[:: places.rows].tolist(), said, totals, covers, strict=True):
        each = {
            tuple(tokens): Found([token for token in tokens if token != PAD], total, cover)
            for tokens, total, cover in zip(*captions, strict=True)
            if total > -math.inf
        }
        # Groups may have found the same one.
        found[picture] = sorted(each.values(), key=lambda caption: -caption.score(length_power))
    return found
