"""The benchmark of decoding: a baseline written anew finds what our search finds."""

import pytest
from sayings import peaked_decoder

from captionscale.config import Decoder
from captionscale.errors import UserError
from captionscale.model.search.generate import search
from captionscale.tools.bench import decode


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_the_published_form_finds_the_captions_of_our_search(beam) -> None:
    for seed in range(4):
        decoder, features = peaked_decoder("attention", seed, words=9)
        settings = {"beam": beam, "max_words": 8, "length_penalty": 0.7}
        for image, (best, *_) in zip(features.split(1), search(decoder, features, **settings), strict=True):
            found = decode.one_after_another(decoder, image, **settings)
            assert found.tokens == best.tokens
            assert found.log_prob == pytest.approx(best.log_prob, abs=1e-4)


def test_the_benchmark_runs_and_its_random_decoder_says_captions_of_some_length(monkeypatch) -> None:
    settings = Decoder(embed_size=32, hidden_size=32, attention_size=16)
    (heat,) = decode.bench(None, images=3, rounds=1, grids=(2,), settings=settings, words=60)
    assert [lane.ratio[0] > 0 for lane in heat.lanes] == [True] * 3
    assert float(heat.notes[1].split()[2]) > 3
    monkeypatch.setattr(decode, "_TOLERANCE", -1.0)
    with pytest.raises(UserError, match="0 captions of two ways differ"):
        decode.bench(None, images=2, rounds=1, grids=(2,), settings=settings, words=60)
