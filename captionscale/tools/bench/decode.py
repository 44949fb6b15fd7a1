"""`captionscale bench decode`: beam search over many pictures at once, beside one after another."""

import math
from functools import partial
from pathlib import Path
from statistics import mean, pstdev

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from captionscale.config import Decoder
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.errors import UserError
from captionscale.model.decoders.attention import AttentionDecoder
from captionscale.model.search.generate import Hypothesis, search
from captionscale.tools.bench.race import Heat, Way, limit, race
from captionscale.train.checkpoints import open_checkpoint
from captionscale.vocab import END, PAD, START, UNK

_GRIDS, _FEATURE, _WORDS = (7, 14), 2048, 9490
_BEAM, _MAX_WORDS, _LENGTH_PENALTY = 5, 20, 0.7

# Log-probabilities of one caption by two ways.
_TOLERANCE = 5e-5

# Of the model with random weights: as peaked as a trained one, with captions as long as COCO's.
_PEAKED, _HEEDING, _STEEP, _LENGTH, _VARYING = 7.0, 5.0, 3.0, 7.0, 0.1


def bench(
    run: Path | None,
    *,
    images: int,
    rounds: int,
    grids: tuple[int, ...] = _GRIDS,
    settings: Decoder | None = None,
    words: int = _WORDS,
) -> list[Heat]:
    """Race them on features, without an encoder.

    Args:
        run: Whose decoder it is, for its validation images; None: a decoder of configs/attention.toml with
            COCO's vocabulary, random weights and random features.
        images: That are captioned; ours has all at once.
        rounds: Of each way.
        grids: Cells on a side of the random features.
        settings: Of the random decoder, with the output `deep`; None: those of configs/attention.toml.
        words: In its vocabulary.

    Raises:
        UserError: No such run, one with another decoder, or captions that differ.
    """
    torch.manual_seed(0)
    if run is not None:
        return [_race(*_of_run(run, images), run.name, rounds)]
    return [
        _race(
            talkative(settings or Decoder(), _FEATURE, words),
            (torch.randn(images, 1, _FEATURE) + torch.randn(images, grid**2, _FEATURE)).relu(),
            _MAX_WORDS,
            f"random weights, {grid} x {grid} regions",
            rounds,
        )
        for grid in grids
    ]


@torch.no_grad()
def talkative(settings: Decoder, feature: int, words: int) -> AttentionDecoder:
    """Return a decoder with random weights whose captions are as long as a trained one's.

    Random weights say that all words are as likely, and end where they will. So the output's matrix is made
    greater, until few words are likely; and a unit of the last LSTM layer counts words, and makes the end
    likelier with each: about ten words after the first it is as likely as the likeliest others.

    Args:
        settings: With the output `deep`.
        feature: Size of a region's feature.
        words: Size of the vocabulary.
    """
    decoder = AttentionDecoder(settings, feature, words).eval()
    cell, unit, hidden = decoder.cells[-1], 0, settings.hidden_size
    output, from_hidden, from_context = decoder.output_projection, decoder.from_hidden, decoder.from_context
    assert isinstance(cell, nn.LSTMCell)
    assert isinstance(output, nn.Linear)
    assert isinstance(from_hidden, nn.Linear)
    assert from_context is not None
    gates = range(unit, 4 * hidden, hidden)
    # Input, forget and output gates stand open; the cell grows by about 0.05 a word.
    for gate, bias, varying in zip(gates, (20, 20, 0.05, 20), (0, 0, _VARYING, 0), strict=True):
        for part in cell.parameters():
            part[gate] *= varying
        cell.bias_ih[gate] = bias
    for first in (decoder.initial_state.weight, decoder.initial_state.bias):
        first.view(2, settings.num_layers, hidden, -1)[:, -1, unit] = 0
    output.weight *= _PEAKED
    torch.nn.init.normal_(decoder.embedding.weight)
    for layer in (from_hidden, from_context):
        layer.weight *= _HEEDING
    # The first number that the output reads is the count, and no word but the end's depends on it.
    decoder.embedding.weight[:, 0] = 0
    for count in (from_hidden.weight[0], from_hidden.bias[:1], from_context.weight[0]):
        count.zero_()
    from_hidden.weight[0, unit] = 1
    output.weight[:, 0] = 0
    output.weight[END] = 0
    output.weight[END, 0] = 20 * _STEEP
    highest = _PEAKED * 0.6 * math.sqrt(2 * math.log(words))
    output.bias[END] = highest - 20 * _STEEP * math.tanh(0.05 * _LENGTH)
    return decoder


@torch.no_grad()
def one_after_another(
    decoder: AttentionDecoder,
    features: Float[Tensor, "1 region feature"],
    *,
    beam: int,
    max_words: int,
    length_penalty: float,
) -> Hypothesis:
    """Return a picture's best caption by beam search as captioners publish it.

    The rows of a batch are the captions under way. At each word all of them look at their own copy of the
    regions, whose keys are computed anew; finished ones leave the batch.

    Args:
        decoder: Without a gate.
        features: Of one picture.
        beam: Captions kept at each word.
        max_words: Greatest number of words.
        length_penalty: Of the ranking.

    Source:
        The form of github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, caption.py, written anew with
        ours' layers and rules: a finished caption keeps its place in the beam until longer ones beat it.
    """
    assert decoder.from_context is not None
    regions = decoder.region_projection(features).relu()
    memory = torch.tanh(decoder.initial_state(regions.mean(1))).view(2, len(decoder.cells), 1, -1)
    hiddens, cells = ([*part.expand(-1, beam, -1)] for part in memory)
    regions = regions.expand(beam, -1, -1)
    said, totals = torch.full((beam, 1), START), torch.zeros(beam)
    finished: list[tuple[float, list[int]]] = []
    for time in range(max_words):
        word = decoder.embedding(said[:, -1])
        keys, query = decoder.attention.key(regions), decoder.attention.query(hiddens[-1])
        weights = decoder.attention.energy(torch.tanh(keys + query.unsqueeze(1))).squeeze(2).softmax(1)
        context = (regions * weights.unsqueeze(2)).sum(1)
        below = torch.cat([word, context], 1)
        for layer, cell in enumerate(decoder.cells):
            below, cells[layer] = cell(below, (hiddens[layer], cells[layer]))
            hiddens[layer] = below
        logits = decoder.output_projection(word + decoder.from_hidden(below) + decoder.from_context(context))
        chances = logits.log_softmax(1)
        chances[:, [PAD, START, UNK]] = -torch.inf
        chances += totals.unsqueeze(1)
        # All rows are one caption at first.
        best, places = (chances[0] if time == 0 else chances.flatten()).topk(beam)
        rows, words = places // chances.shape[1], places % chances.shape[1]
        longer = torch.cat([said[rows], words.unsqueeze(1)], 1)
        kept = [(total, tokens, -1) for total, tokens in finished]
        kept += [(best[each].item(), longer[each].tolist(), each) for each in range(beam)]
        kept = sorted(kept, key=lambda caption: -caption[0])[:beam]
        finished = [(total, tokens) for total, tokens, _ in kept if tokens[-1] == END]
        going = [each for _, tokens, each in kept if tokens[-1] != END]
        if not going:
            break
        said, totals, rows = longer[going], best[going], rows[going]
        regions = regions[rows]
        hiddens, cells = ([part[rows] for part in parts] for parts in (hiddens, cells))
    found = [Hypothesis(tokens[1:], total) for total, tokens, _ in kept]
    return max(found, key=lambda caption: caption.score(length_penalty))


def _of_run(run: Path, images: int) -> tuple[AttentionDecoder, Tensor, int]:
    saved = open_checkpoint(run)
    config, captioner = saved.config(), saved.captioner()
    decoder, settings = captioner.decoder, config.model.decoder
    if (
        not isinstance(decoder, AttentionDecoder)
        or settings.attention_gate
        or settings.word_head != "deep"
        or settings.tie_weights
    ):
        raise UserError(
            f"{run}: its decoder is '{settings.name}' with options of its own, wanted 'attention' without"
            " gate, tied words or another output than 'deep'; take another run"
        )
    split = Split(open_storage(config.data.shards), config.data.val_split)
    loader = Loader(split, saved.vocabulary(), config.data, config.seed)
    (batch,) = loader.prefetch([(np.arange(min(images, len(split))), None)])
    with torch.no_grad():
        return decoder, captioner.encode(batch.images), config.data.max_words


def _race(decoder: AttentionDecoder, features: Tensor, max_words: int, name: str, rounds: int) -> Heat:
    each = [features[number : number + 1] for number in range(len(features))]
    find = partial(search, decoder, beam=_BEAM, max_words=max_words, length_penalty=_LENGTH_PENALTY)
    plain = partial(
        one_after_another, decoder, beam=_BEAM, max_words=max_words, length_penalty=_LENGTH_PENALTY
    )

    def at_once() -> list[Hypothesis]:
        return [found[0] for found in find(features)]

    def ours_alone() -> list[Hypothesis]:
        return [find(picture)[0][0] for picture in each]

    def published() -> list[Hypothesis]:
        return [plain(picture) for picture in each]

    expected = published()
    difference = max(_differ(name, found, expected) for found in (at_once(), ours_alone()))
    count = len(features)
    heat = race(
        f"Beam search, beam {_BEAM}, {count} images: {name}, {decoder.embedding.num_embeddings:,} words",
        "images",
        [
            Way("captionscale, all images at once", at_once, count),
            Way("captionscale, one image at a time", ours_alone, count),
            Way("one image at a time, as published", published, count),
        ],
        rounds,
        by_cpu=True,
    )
    lengths = [len([token for token in found.tokens if token != END]) for found in expected]
    heat.notes += [
        f"All captions are equal; the greatest difference of two log-probabilities is {difference:.1e}.",
        f"Captions have {mean(lengths):.1f} words, standard deviation {pstdev(lengths):.1f}.",
        limit(at_once, count * heat.lanes[0].cpu_ms),
    ]
    return heat


def _differ(name: str, found: list[Hypothesis], expected: list[Hypothesis]) -> float:
    """Return the greatest difference of two log-probabilities of a caption."""
    others = sum(one.tokens != other.tokens for one, other in zip(found, expected, strict=True))
    pairs = zip(found, expected, strict=True)
    difference = max(abs(one.log_prob - other.log_prob) for one, other in pairs)
    if others or difference > _TOLERANCE:
        raise UserError(
            f"bench decode, {name}: {others} captions of two ways differ, their log-probabilities by"
            f" {difference:g}, wanted none and at most {_TOLERANCE:g}; tell us of it"
        )
    return difference
