from collections import Counter

import pytest
import torch
from tiny_decoders import FIRST_WORD, IMAGES, mask_special_tokens, peaked_decoder

from captionscale.config_model import DECODERS
from captionscale.model.search.constraints import Constraints
from captionscale.model.search.generate import search
from captionscale.model.search.sampling import sample
from captionscale.vocab import END, PAD, START

MAX_WORDS = 3


@pytest.fixture(params=DECODERS)
def case(request: pytest.FixtureRequest):
    """A decoder of three words, and images."""
    decoder, features = peaked_decoder(request.param, 0)
    return mask_special_tokens(decoder), features


def drawn(decoder, features, captions, seed=0, max_words=MAX_WORDS, **settings):
    torch.manual_seed(seed)
    tokens, totals = sample(decoder, features, samples_per_image=captions, max_words=max_words, **settings)
    return tokens.view(len(features), captions, -1), totals.view(len(features), captions)


def without_padding(row: torch.Tensor) -> tuple[int, ...]:
    return tuple(token for token in row.tolist() if token != PAD)


def test_captions_are_drawn_as_often_as_they_are_likely(case) -> None:
    """Of 40 captions, each with its own share of 10,000 draws: within five standard deviations."""
    decoder, features = case
    draws = 10_000
    tokens, totals = drawn(decoder, features, draws)
    wide = search(decoder, features, beam=200, max_words=MAX_WORDS, length_penalty=0.0)
    for rows, chances, captions in zip(tokens, totals.exp().tolist(), wide, strict=True):
        counts = Counter(map(without_padding, rows))
        said = dict(zip(map(without_padding, rows), chances, strict=True))
        expected = {tuple(caption.tokens): caption.log_prob for caption in captions}
        assert counts.keys() <= expected.keys()
        for caption, log_prob in expected.items():
            chance = torch.tensor(log_prob).exp().item()
            if caption in said:
                assert said[caption] == pytest.approx(chance, rel=1e-3)
            spread = (draws * chance * (1 - chance)) ** 0.5
            assert abs(counts[caption] - draws * chance) <= 5 * spread + 1


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"temperature": 2.0}, lambda p: p.sqrt()),
        ({"temperature": 0.5}, lambda p: p**2),
        ({"top_k": 2}, lambda p: p * (p >= p.sort().values[-2])),
        # The fewest of the likeliest that have half together.
        ({"top_p": 0.5}, lambda p: p * (p >= p.sort(descending=True).values[top(p, 0.5)])),
        ({"top_p": 0.9}, lambda p: p * (p >= p.sort(descending=True).values[top(p, 0.9)])),
        (
            {"top_k": 3, "top_p": 0.8},
            lambda p: (
                p * (p >= p.sort(descending=True).values[min(2, top(p / p.sort().values[-3:].sum(), 0.8))])
            ),
        ),
    ],
    # Not what a function is printed as, which differs between workers.
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@torch.no_grad()
def test_temperature_top_k_and_top_p_change_the_next_words_chances_as_written(case, settings, share) -> None:
    decoder, features = case
    tokens, totals = drawn(decoder, features, 4000, max_words=1, **settings)
    logits, _, _ = decoder.step(torch.full((IMAGES,), START), decoder.start(features))
    for rows, chances, own in zip(tokens, totals.exp(), logits.softmax(1), strict=True):
        expected = share(own) / share(own).sum()
        frequencies = torch.bincount(rows[:, 0], minlength=len(own)) / len(rows)
        assert (frequencies - expected).abs().max() < 0.04
        assert torch.allclose(chances, expected[rows[:, 0]], rtol=1e-3)


def top(chances: torch.Tensor, least: float) -> int:
    """Return the place of the last of the likeliest words that are needed for this probability."""
    return int((chances.sort(descending=True).values.cumsum(0) < least).sum())


def test_the_likeliest_word_alone_or_a_cold_temperature_is_greedy_search(case) -> None:
    decoder, features = case
    greedy = search(decoder, features, beam=1, max_words=6, length_penalty=0.0)
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        tokens, totals = drawn(decoder, features, 3, max_words=6, **settings)
        for rows, captions in zip(tokens, greedy, strict=True):
            assert {without_padding(row) for row in rows} == {tuple(captions[0].tokens)}
        assert totals.abs().max() < 1e-3


def test_a_caption_is_a_function_of_its_own_numbers(case) -> None:
    """Neither of the other images, nor of which captions are finished and dropped."""
    decoder, features = case
    uniforms = torch.rand(IMAGES * 2, 12, generator=torch.Generator().manual_seed(3))
    together, totals = sample(decoder, features, samples_per_image=2, max_words=12, uniforms=uniforms)
    for row in range(IMAGES * 2):
        image = features[row // 2 : row // 2 + 1]
        alone, total = sample(
            decoder, image, samples_per_image=1, max_words=12, uniforms=uniforms[row : row + 1]
        )
        assert without_padding(alone[0]) == without_padding(together[row])
        assert total.item() == pytest.approx(totals[row].item(), rel=1e-4, abs=1e-4)


def test_rows_hold_words_then_the_end_then_padding_and_are_cut_without_an_end(case) -> None:
    decoder, features = case
    tokens, _ = drawn(decoder, features, 200, max_words=5)
    assert tokens.shape[2] == 5
    ended = 0
    for row in tokens.view(-1, 5).tolist():
        words = row[: row.index(END)] if END in row else row
        ended += END in row
        assert all(token >= FIRST_WORD for token in words)
        assert row[len(words) :] == ([END] + [PAD] * 4)[: 5 - len(words)]
    assert 0 < ended < 1000
    with torch.no_grad():
        decoder.output_projection.bias[END] = 1e4
    tokens, totals = drawn(decoder, features, 2, max_words=5)
    assert tokens.tolist() == [[[END], [END]]] * IMAGES
    assert totals.abs().max() < 1e-6


def test_masked_words_are_never_sampled_even_with_extreme_uniforms() -> None:
    decoder, features = peaked_decoder("plain", 0, words=40)
    uniforms = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24]).repeat(IMAGES, 1)
    for settings in ({}, {"top_k": 44}, {"top_p": 0.999}):
        tokens, totals = sample(
            decoder,
            features,
            samples_per_image=1,
            max_words=4,
            uniforms=uniforms,
            constraints=Constraints(),
            **settings,
        )
        assert totals.isfinite().all()
        assert ((tokens >= FIRST_WORD) | (tokens == END) | (tokens == PAD)).all()


def test_words_cannot_be_required_of_samples(case) -> None:
    decoder, features = case
    with pytest.raises(ValueError, match="required"):
        drawn(decoder, features, 1, constraints=Constraints(required=((FIRST_WORD,),)))
