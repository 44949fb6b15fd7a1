import math
from itertools import product

import pytest
import torch
from tiny_decoders import IMAGES, mask_special_tokens, peaked_decoder
from torch import Tensor

from captionscale.config_model import DECODERS
from captionscale.model.decoders.decoder import Decoder
from captionscale.model.search.generate import Hypothesis, search
from captionscale.vocab import END, PAD, SPECIAL_TOKENS, START, UNK


@pytest.fixture(
    params=[(name, seed) for name in DECODERS for seed in range(2)], ids=lambda p: f"{p[0]}{p[1]}"
)
def case(request: pytest.FixtureRequest) -> tuple[Decoder, Tensor]:
    """A decoder of three words with strong opinions, and images."""
    return peaked_decoder(*request.param)


def said(decoder, features, beam, max_words=4, length_penalty=0.7, **settings) -> list[list[Hypothesis]]:
    return search(
        decoder, features, beam=beam, max_words=max_words, length_penalty=length_penalty, **settings
    )


@torch.no_grad()
def log_prob(decoder: Decoder, image: Tensor, tokens: list[int]) -> float:
    """Return what teacher-forced reading of a caption says of it."""
    logits, _ = decoder.teacher_forced(
        image.unsqueeze(0), torch.tensor([[START, *tokens[:-1]]]), [len(tokens)], torch.tensor([0])
    )
    return logits.log_softmax(1)[range(len(tokens)), tokens].sum().item()


@torch.no_grad()
def next_words(decoder: Decoder, image: Tensor, tokens: list[int]) -> dict[int, float]:
    """Return the log-probability of each word that may follow these."""
    logits, _ = decoder.teacher_forced(
        image.unsqueeze(0), torch.tensor([[START, *tokens]]), [len(tokens) + 1], torch.tensor([0])
    )
    chances = logits[-1].log_softmax(0).tolist()
    return {token: chance for token, chance in enumerate(chances) if token not in (PAD, START, UNK)}


def test_a_beam_of_one_is_greedy(case) -> None:
    decoder, features = case
    for image, captions in zip(features, said(decoder, features, beam=1, max_words=6), strict=True):
        tokens: list[int] = []
        while len(tokens) < 6 and END not in tokens:
            follow = next_words(decoder, image, tokens)
            tokens.append(max(follow, key=follow.__getitem__))
        assert [caption.tokens for caption in captions] == [tokens]


@pytest.mark.parametrize("beam", [2, 3, 7])
def test_a_beam_keeps_the_likeliest_prefixes_at_each_word(case, beam) -> None:
    decoder, features = case
    for image, captions in zip(features, said(decoder, features, beam), strict=True):
        kept: list[tuple[list[int], float]] = [([], 0.0)]
        for _ in range(4):
            longer = [(tokens, total) for tokens, total in kept if END in tokens]
            for tokens, total in kept:
                if END not in tokens:
                    follow = next_words(decoder, image, tokens)
                    longer += [([*tokens, word], total + chance) for word, chance in follow.items()]
            kept = sorted(longer, key=lambda caption: -caption[1])[:beam]
        kept.sort(key=lambda caption: -caption[1] / len(caption[0]) ** 0.7)
        assert [caption.tokens for caption in captions] == [tokens for tokens, _ in kept]


def test_a_beam_wider_than_all_captions_ranks_them_as_brute_force_does(case) -> None:
    decoder, features = case
    words, max_words = range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 3), 3
    finished = [[*caption, END] for count in range(max_words) for caption in product(words, repeat=count)]
    every = finished + [list(caption) for caption in product(words, repeat=max_words)]
    ranked = {power: said(decoder, features, len(every) + 3, max_words, power) for power in (0.0, 0.7, 2.0)}
    for number, image in enumerate(features):
        expected = {tuple(tokens): log_prob(decoder, image, tokens) for tokens in every}
        for power, found in ranked.items():
            captions = {tuple(caption.tokens): caption.log_prob for caption in found[number]}
            assert len(captions) == len(found[number]) == len(every)
            assert captions == pytest.approx(expected, abs=1e-4)
            scores = {tokens: total / len(tokens) ** power for tokens, total in expected.items()}
            assert tuple(found[number][0].tokens) == max(scores, key=scores.__getitem__)


def test_many_images_at_once_get_the_captions_that_each_gets_alone(case) -> None:
    decoder, features = case
    for beam in (1, 3):
        together = said(decoder, features, beam)
        for number in range(IMAGES):
            (alone,) = said(decoder, features[number : number + 1], beam)
            assert [caption.tokens for caption in alone] == [caption.tokens for caption in together[number]]
            for one, other in zip(alone, together[number], strict=True):
                assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_captions_found_are_distinct_sorted_and_without_special_tokens(case, beam) -> None:
    decoder, features = case
    for image, captions in zip(features, said(decoder, features, beam), strict=True):
        assert 1 <= len({tuple(caption.tokens) for caption in captions}) == len(captions) <= beam
        scores = [caption.score(0.7) for caption in captions]
        assert scores == sorted(scores, reverse=True)
        for caption in captions:
            assert not {PAD, START, UNK} & set(caption.tokens)
            assert END not in caption.tokens[:-1]
            assert caption.tokens[-1] == END or len(caption.tokens) == 4
            expected = log_prob(decoder, image, caption.tokens)
            assert caption.log_prob == pytest.approx(expected, abs=1e-4)


def test_special_tokens_are_not_generated_however_likely_they_are(case) -> None:
    decoder, features = case
    with torch.no_grad():
        decoder.output_projection.bias[[PAD, START, UNK]] += 100
    for captions in said(decoder, features, beam=3):
        assert all(not {PAD, START, UNK} & set(caption.tokens) for caption in captions)


def test_an_unfinished_caption_is_returned_unfinished(case) -> None:
    decoder, features = case
    with torch.no_grad():
        decoder.output_projection.bias[END] -= 100
    for captions in said(decoder, features, beam=3):
        assert [len(caption.tokens) for caption in captions] == [4, 4, 4]
        assert all(END not in caption.tokens for caption in captions)


def test_a_decoder_that_has_nothing_to_say_ends_at_once(case) -> None:
    decoder, features = case
    with torch.no_grad():
        decoder.output_projection.bias[END] += 100
    for captions in said(decoder, features, beam=1):
        assert [caption.tokens for caption in captions] == [[END]]


def test_the_found_captions_that_are_all_there_are_have_probability_one_together(case) -> None:
    decoder, features = case
    for captions in said(mask_special_tokens(decoder), features, beam=200, max_words=4):
        # 1 + 3 + 9 + 27 that end, and 81 that do not.
        assert len(captions) == 121
        assert sum(math.exp(caption.log_prob) for caption in captions) == pytest.approx(1, abs=1e-4)


def test_the_best_score_rises_with_the_width_to_the_true_best(case) -> None:
    """It is no theorem for each image, as a wider beam may lose a caption; it holds for the mean here."""
    decoder, features = case
    best = torch.tensor(
        [
            [captions[0].score(0.0) for captions in said(decoder, features, beam, length_penalty=0.0)]
            for beam in (1, 2, 4, 8, 16, 32, 200)
        ],
        dtype=torch.float64,
    )
    assert (best <= best[-1] + 1e-5).all()
    assert (best.mean(1).diff() >= -1e-5).all()
    assert torch.allclose(best[-2], best[-1], atol=1e-5)


def test_one_group_is_a_plain_beam_and_groups_without_a_price_find_the_same_captions(case) -> None:
    decoder, features = case
    plain, one = (
        said(decoder, features, 4, **more) for more in ({}, {"groups": 1, "diversity_penalty": 9.0})
    )
    assert plain == one
    halves, two = said(decoder, features, 2), said(decoder, features, 4, groups=2, diversity_penalty=0.0)
    for each, both in zip(halves, two, strict=True):
        assert [caption.tokens for caption in both] == [caption.tokens for caption in each]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_groups_choose_in_turn_and_are_penalized_for_the_same_word_at_the_same_step(case, width) -> None:
    """Algorithm 1 of Vijayakumar et al. 2016, written out; a finished caption says nothing more."""
    decoder, features = case
    price = 1.5
    found = said(decoder, features, 2 * width, 5, groups=2, diversity_penalty=price)
    for image, captions in zip(features, found, strict=True):
        groups: list[list[tuple[tuple[int, ...], float]]] = [[((), 0.0)], [((), 0.0)]]
        for _ in range(5):
            spoken: list[int] = []
            for number, group in enumerate(groups):
                longer = [(total, tokens, total) for tokens, total in group if END in tokens]
                for tokens, total in group:
                    if END not in tokens:
                        follow = next_words(decoder, image, list(tokens))
                        longer += [
                            (total + chance - price * spoken.count(word), (*tokens, word), total + chance)
                            for word, chance in follow.items()
                        ]
                kept = sorted(longer, reverse=True)[:width]
                spoken += [each[-1] for _, each, _ in kept if each not in dict(group)]
                groups[number] = [(tokens, total) for _, tokens, total in kept]
        expected = dict(groups[0] + groups[1])
        assert {tuple(each.tokens): each.log_prob for each in captions} == pytest.approx(expected, abs=1e-4)


def test_a_high_price_makes_groups_differ_where_they_would_agree() -> None:
    decoder, features = peaked_decoder("attention", 3, words=30)
    for diversity_penalty, fewest in ((0.0, 1), (1e4, 6)):
        for captions in said(decoder, features, 6, groups=6, diversity_penalty=diversity_penalty):
            assert len({caption.tokens[0] for caption in captions}) == fewest


@pytest.mark.parametrize("beam", [3, 7])
def test_many_images_at_once_get_in_groups_what_each_gets_alone(case, beam) -> None:
    decoder, features = case
    together = said(decoder, features, beam, 6, groups=beam)
    for number in range(IMAGES):
        (alone,) = said(decoder, features[number : number + 1], beam, 6, groups=beam)
        assert [caption.tokens for caption in alone] == [caption.tokens for caption in together[number]]


def test_images_that_finish_early_change_nothing_for_the_others() -> None:
    """They are dropped, a quarter of them at a time."""
    decoder, features = peaked_decoder("attention", 0, words=9)
    features = features.repeat(8, 1, 1) + torch.randn(40, 4, 6)
    with torch.no_grad():
        decoder.output_projection.bias[END] += 1
    for settings in ({"beam": 1}, {"beam": 3}, {"beam": 4, "groups": 2}):
        together = said(decoder, features, max_words=16, **settings)
        lengths = {len(captions[0].tokens) for captions in together}
        assert len(lengths) > 3
        for number in range(0, 40, 7):
            (alone,) = said(decoder, features[number : number + 1], max_words=16, **settings)
            assert [caption.tokens for caption in alone] == [caption.tokens for caption in together[number]]
