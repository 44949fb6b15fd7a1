"""The attention tutorial's training step and beam search, with the layers of our decoder.

Source:
    The form of github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning (models.py, train.py,
    caption.py), written anew: LSTMCell in a loop over time steps, the keys of attention computed anew at
    each of them, batches that shrink.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from captionscale.model.decoders.attention import AttentionDecoder
from captionscale.model.search.generate import Hypothesis
from captionscale.train.losses import Target
from captionscale.vocab import END, PAD, START, UNK


def tutorial_forward(
    decoder: AttentionDecoder,
    features: Float[Tensor, "caption region feature"],
    tokens: Int[Tensor, "caption time"],
) -> tuple[Float[Tensor, "caption time token"], Float[Tensor, "caption time region"], list[int], Tensor]:
    """Return teacher-forced logits.

    Args:
        decoder: With one layer, a gate and the word head `linear`.
        features: Of each caption's image.
        tokens: Inputs.

    Returns:
        Logits, attention, lengths, and the captions' order, longest first.
    """
    sorted_lengths, order = (tokens != PAD).sum(1).sort(descending=True)
    lengths = sorted_lengths.tolist()
    regions = decoder.region_projection(features[order]).relu()
    embeddings = decoder.embedding(tokens[order])
    hidden, cell = torch.tanh(decoder.initial_state(regions.mean(1))).chunk(2, 1)
    logits = regions.new_zeros(len(tokens), lengths[0], decoder.embedding.num_embeddings)
    attention = regions.new_zeros(len(tokens), lengths[0], regions.shape[1], dtype=torch.float32)
    assert decoder.gate is not None
    for time in range(lengths[0]):
        count = sum(length > time for length in lengths)
        seen, before = regions[:count], hidden[:count]
        weights = _attend(decoder, seen, before)
        context = decoder.gate(before).sigmoid() * (seen * weights.unsqueeze(2)).sum(1)
        inputs = torch.cat([embeddings[:count, time], context], 1)
        hidden, cell = decoder.cells[0](inputs, (before, cell[:count]))
        logits[:count, time] = decoder.output_projection(hidden)
        attention[:count, time] = weights
    return logits, attention, lengths, order


def tutorial_loss(decoder: AttentionDecoder, features: Tensor, target: Target) -> Float[Tensor, ""]:
    """Return the loss per token with the doubly stochastic penalty."""
    logits, attention, lengths, order = tutorial_forward(decoder, features, target.input_tokens)
    predicted, expected = (
        pack_padded_sequence(part, lengths, batch_first=True).data
        for part in (logits, target.tokens[order, 1:])
    )
    penalty = (1 - attention.sum(1)).square().sum() / len(expected)
    return F.cross_entropy(predicted.float(), expected) + penalty


@torch.no_grad()
def tutorial_beam_search(
    decoder: AttentionDecoder,
    features: Float[Tensor, "1 region feature"],
    *,
    beam: int,
    max_words: int,
    length_penalty: float,
) -> Hypothesis:
    """Return an image's best caption.

    The batch holds the unfinished captions, each with its own copy of the regions. A finished caption keeps
    its place in the beam until longer ones beat it, as in our search.

    Args:
        decoder: Without a gate.
        features: Of one image.
        beam: Captions kept at each step.
        max_words: Maximum number of words.
        length_penalty: Of the ranking.
    """
    assert decoder.from_context is not None
    regions = decoder.region_projection(features).relu()
    states = torch.tanh(decoder.initial_state(regions.mean(1))).view(2, len(decoder.cells), 1, -1)
    hiddens, cells = ([*part.expand(-1, beam, -1)] for part in states)
    regions = regions.expand(beam, -1, -1)
    captions, totals = torch.full((beam, 1), START), torch.zeros(beam)
    finished: list[tuple[float, list[int]]] = []
    for time in range(max_words):
        word = decoder.embedding(captions[:, -1])
        context = (regions * _attend(decoder, regions, hiddens[-1]).unsqueeze(2)).sum(1)
        below = torch.cat([word, context], 1)
        for layer, cell in enumerate(decoder.cells):
            below, cells[layer] = cell(below, (hiddens[layer], cells[layer]))
            hiddens[layer] = below
        logits = decoder.output_projection(word + decoder.from_hidden(below) + decoder.from_context(context))
        log_probs = logits.log_softmax(1)
        log_probs[:, [PAD, START, UNK]] = -torch.inf
        log_probs += totals.unsqueeze(1)
        # All rows are the same caption at first.
        best, places = (log_probs[0] if time == 0 else log_probs.flatten()).topk(beam)
        rows, tokens = places // log_probs.shape[1], places % log_probs.shape[1]
        longer = torch.cat([captions[rows], tokens.unsqueeze(1)], 1)
        kept = [(total, each, -1) for total, each in finished]
        kept += [(best[row].item(), longer[row].tolist(), row) for row in range(beam)]
        kept = sorted(kept, key=lambda caption: -caption[0])[:beam]
        finished = [(total, each) for total, each, _ in kept if each[-1] == END]
        unfinished = [row for _, each, row in kept if each[-1] != END]
        if not unfinished:
            break
        captions, totals, rows = longer[unfinished], best[unfinished], rows[unfinished]
        regions = regions[rows]
        hiddens, cells = ([part[rows] for part in parts] for parts in (hiddens, cells))
    found = [Hypothesis(each[1:], total) for total, each, _ in kept]
    return max(found, key=lambda caption: caption.score(length_penalty))


def _attend(decoder: AttentionDecoder, regions: Tensor, hidden: Tensor) -> Float[Tensor, "caption region"]:
    keys, query = decoder.attention.key(regions), decoder.attention.query(hidden)
    weights: Tensor = decoder.attention.energy(torch.tanh(keys + query.unsqueeze(1))).squeeze(2).softmax(1)
    return weights
