"""Beam search: all images at once, one at a time, and one at a time as the attention tutorial publishes it.

Measured gains (docs/performance.md): all images at once 4.8 times as fast as the tutorial's search with 7 x
7 regions, and 5.5 times with 14 x 14; 3 to 4 times as fast as our own search with one image at a time.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from baselines import tutorial_beam_search
from comparison import Candidate, Table, compare, product_bound, run
from torch import Tensor, nn

from captionscale.config_model import AttentionConfig
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.errors import UserError
from captionscale.model.decoders.attention import AttentionDecoder
from captionscale.model.decoders.decoder import Decoder
from captionscale.model.search.generate import Hypothesis, search
from captionscale.train.checkpoint import open_checkpoint
from captionscale.vocab import END

_BEAM, _MAX_WORDS, _LENGTH_PENALTY = 5, 20, 0.7
# Of the log-probabilities of one caption.
_TOLERANCE = 5e-5
# Of the random weights: as peaked as trained ones, with captions as long as COCO's.
_PEAKED, _ATTENTIVE, _STEEP, _LENGTH, _VARYING = 7.0, 5.0, 3.0, 7.0, 0.1


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Run the benchmark; return its tables."""
    parser = argparse.ArgumentParser("decode.py", description="Beam search, on features of images.")
    parser.add_argument(
        "--run", type=Path, help="use its decoder and validation images (default: random weights)"
    )
    parser.add_argument("--images", type=int, metavar="N", help="at once (default: 32)")
    coco = {"grids": (7, 14), "feature": 2048, "words": 9490, "decoder": AttentionConfig()}
    small = AttentionConfig(embed_size=32, hidden_size=32, attention_size=16)
    return run(
        _measure,
        parser,
        arguments,
        full={"images": 32, "rounds": 5, **coco},
        quick={"images": 8, "rounds": 1, **coco},
        tiny={"images": 3, "rounds": 1, "grids": (2,), "feature": 64, "words": 60, "decoder": small},
    )


def _measure(options: argparse.Namespace) -> Iterator[Table]:
    torch.manual_seed(0)
    images, size = options.images, options.feature
    if options.run is not None:
        yield _compare(*_from_run(options.run, images), options.run.name, options.rounds)
        return
    for grid in options.grids:
        decoder = random_decoder(options.decoder, size, options.words)
        features = (torch.randn(images, 1, size) + torch.randn(images, grid**2, size)).relu()
        name = f"random weights, {grid} x {grid} regions"
        yield _compare(decoder, features, _MAX_WORDS, name, options.rounds)


@torch.no_grad()
def random_decoder(settings: AttentionConfig, feature: int, words: int) -> AttentionDecoder:
    """Return a decoder with random weights whose captions are as long as a trained one's.

    Plain random weights make all words equally likely and have no end. So the output matrix is scaled until
    few words are likely; and a unit of the last LSTM layer counts words and raises the end token's logit with
    each, until it is the most likely token after about ten words.

    Args:
        settings: With the word head `deep`.
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
    # Input, forget and output gates are open; the cell grows by about 0.05 per word.
    for gate, bias, varying in zip(gates, (20, 20, 0.05, 20), (0, 0, _VARYING, 0), strict=True):
        for part in cell.parameters():
            part[gate] *= varying
        cell.bias_ih[gate] = bias
    for first in (decoder.initial_state.weight, decoder.initial_state.bias):
        first.view(2, settings.num_layers, hidden, -1)[:, -1, unit] = 0
    output.weight *= _PEAKED
    nn.init.normal_(decoder.embedding.weight)
    for layer in (from_hidden, from_context):
        layer.weight *= _ATTENTIVE
    # The output's first input is the count; only the end token's logit depends on it.
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


def _from_run(run: Path, images: int) -> tuple[AttentionDecoder, Tensor, int]:
    saved = open_checkpoint(run)
    config, captioner = saved.config(), saved.captioner()
    decoder, settings = captioner.decoder, config.model.decoder
    if (
        not isinstance(decoder, AttentionDecoder)
        or not isinstance(settings, AttentionConfig)
        or settings.attention_gate
        or settings.word_head != "deep"
        or settings.tie_weights
    ):
        raise UserError(
            f"{run}: its decoder is '{settings.name}' with other options, expected 'attention' without gate"
            " and tied weights, with the word head 'deep'; take another run"
        )
    split = Split(open_storage(config.data.shards), config.data.val_split)
    loader = Loader(split, saved.vocabulary(), config.data, config.seed)
    (batch,) = loader.prefetch([(np.arange(min(images, len(split))), None)])
    with torch.no_grad():
        return decoder, captioner.encode(batch.images), config.data.max_words


def _compare(decoder: AttentionDecoder, features: Tensor, max_words: int, name: str, rounds: int) -> Table:
    images = [image.unsqueeze(0) for image in features]
    options: dict[str, Any] = {"beam": _BEAM, "max_words": max_words, "length_penalty": _LENGTH_PENALTY}

    def at_once() -> list[Hypothesis]:
        return [found[0] for found in search(decoder, features, **options)]

    def one_at_a_time() -> list[Hypothesis]:
        return [search(decoder, image, **options)[0][0] for image in images]

    def with_copies() -> list[Hypothesis]:
        with patch.object(AttentionDecoder, "select", Decoder.select):
            return at_once()

    def published() -> list[Hypothesis]:
        return [tutorial_beam_search(decoder, image, **options) for image in images]

    expected = published()
    difference = max(_check_equal(found, expected) for found in (at_once(), with_copies(), one_at_a_time()))
    count = len(features)
    table = compare(
        f"Beam search, beam {_BEAM}, {count} images: {name}, {decoder.embedding.num_embeddings:,} words",
        "images",
        [
            Candidate("captionscale, all images at once", at_once, count),
            Candidate("captionscale, regions copied for each caption", with_copies, count),
            Candidate("captionscale, one image at a time", one_at_a_time, count),
            Candidate("the tutorial's form, one image at a time", published, count),
        ],
        rounds,
        by_cpu=True,
    )
    lengths = [len([token for token in found.tokens if token != END]) for found in expected]
    table.notes += [
        f"All captions are equal; their log-probabilities differ by {difference:.1e} at most.",
        f"Captions have {mean(lengths):.1f} words, standard deviation {pstdev(lengths):.1f}.",
        product_bound(at_once, count * table.results[0].cpu_ms),
    ]
    return table


def _check_equal(found: list[Hypothesis], expected: list[Hypothesis]) -> float:
    """Return the maximum difference of two log-probabilities of a caption."""
    pairs = list(zip(found, expected, strict=True))
    differ = sum(one.tokens != other.tokens for one, other in pairs)
    gap = max(abs(one.log_prob - other.log_prob) for one, other in pairs)
    if differ or gap > _TOLERANCE:
        raise UserError(
            f"{differ} captions of two candidates differ, their log-probabilities by {gap:g}, expected none"
            f" and at most {_TOLERANCE:g}; please report this"
        )
    return gap


if __name__ == "__main__":
    main()
