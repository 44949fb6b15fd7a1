from itertools import product

import pytest
import torch
from torch import Tensor

from captionscale.config import Decoder
from captionscale.model.decoders import DECODERS, AttentionDecoder, PlainDecoder
from captionscale.model.search import Found, search
from captionscale.vocab import END, PAD, SPECIALS, START, UNKNOWN

FEATURE, REGIONS, IMAGES = 6, 4, 5


@pytest.fixture(
    params=[(name, seed) for name in DECODERS for seed in range(2)], ids=lambda p: f"{p[0]}{p[1]}"
)
def case(request: pytest.FixtureRequest) -> tuple[PlainDecoder | AttentionDecoder, Tensor]:
    """A decoder of three words with strong opinions, and images."""
    name, seed = request.param
    torch.manual_seed(seed)
    settings = Decoder(name=name, embed=5, hidden=7, attend=8, layers=1)
    decoder = DECODERS[name](settings, FEATURE, len(SPECIALS) + 3).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder, torch.randn(IMAGES, REGIONS, FEATURE)


def said(decoder, features, beam, max_words=4, length_power=0.7) -> list[list[Found]]:
    return search(decoder, features, beam=beam, max_words=max_words, length_power=length_power)


@torch.no_grad()
def log_probability(decoder: PlainDecoder | AttentionDecoder, image: Tensor, tokens: list[int]) -> float:
    """Return what teacher-forced reading of a caption says of it."""
    logits, _ = decoder(image.unsqueeze(0), torch.tensor([[START, *tokens[:-1]]]), torch.tensor([0]))
    return logits[0].log_softmax(1)[range(len(tokens)), tokens].sum().item()


@torch.no_grad()
def next_words(
    decoder: PlainDecoder | AttentionDecoder, image: Tensor, tokens: list[int]
) -> dict[int, float]:
    """Return the log-probability of each word that may follow these."""
    logits, _ = decoder(image.unsqueeze(0), torch.tensor([[START, *tokens]]), torch.tensor([0]))
    chances = logits[0, -1].log_softmax(0).tolist()
    return {token: chance for token, chance in enumerate(chances) if token not in (PAD, START, UNKNOWN)}


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


@pytest.mark.parametrize("length_power", [0.0, 0.7, 2.0])
def test_a_beam_wider_than_all_captions_ranks_them_as_brute_force_does(case, length_power) -> None:
    decoder, features = case
    words, max_words = range(len(SPECIALS), len(SPECIALS) + 3), 3
    finished = [[*caption, END] for count in range(max_words) for caption in product(words, repeat=count)]
    every = finished + [list(caption) for caption in product(words, repeat=max_words)]
    for image, captions in zip(
        features, said(decoder, features, len(every) + 3, max_words, length_power), strict=True
    ):
        found = {tuple(caption.tokens): caption for caption in captions}
        assert len(found) == len(captions) == len(every)
        scores = {}
        for tokens in every:
            expected = log_probability(decoder, image, tokens)
            assert found[tuple(tokens)].log_probability == pytest.approx(expected, abs=1e-4)
            scores[tuple(tokens)] = expected / len(tokens) ** length_power
        assert tuple(captions[0].tokens) == max(scores, key=scores.__getitem__)


def test_many_images_at_once_get_the_captions_that_each_gets_alone(case) -> None:
    decoder, features = case
    for beam in (1, 3):
        together = said(decoder, features, beam)
        for number in range(IMAGES):
            (alone,) = said(decoder, features[number : number + 1], beam)
            assert [caption.tokens for caption in alone] == [caption.tokens for caption in together[number]]
            for one, other in zip(alone, together[number], strict=True):
                assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_what_is_found_is_distinct_sorted_and_says_no_special_token(case, beam) -> None:
    decoder, features = case
    for image, captions in zip(features, said(decoder, features, beam), strict=True):
        assert 1 <= len({tuple(caption.tokens) for caption in captions}) == len(captions) <= beam
        scores = [caption.score(0.7) for caption in captions]
        assert scores == sorted(scores, reverse=True)
        for caption in captions:
            assert not {PAD, START, UNKNOWN} & set(caption.tokens)
            assert END not in caption.tokens[:-1]
            assert caption.tokens[-1] == END or len(caption.tokens) == 4
            expected = log_probability(decoder, image, caption.tokens)
            assert caption.log_probability == pytest.approx(expected, abs=1e-4)


def test_special_tokens_are_not_said_however_likely_they_are(case) -> None:
    decoder, features = case
    with torch.no_grad():
        decoder.vocabulary.bias[[PAD, START, UNKNOWN]] += 100
    for captions in said(decoder, features, beam=3):
        assert all(not {PAD, START, UNKNOWN} & set(caption.tokens) for caption in captions)


def test_an_unfinished_caption_is_returned_as_it_stands(case) -> None:
    decoder, features = case
    with torch.no_grad():
        decoder.vocabulary.bias[END] -= 100
    for captions in said(decoder, features, beam=3):
        assert [len(caption.tokens) for caption in captions] == [4, 4, 4]
        assert all(END not in caption.tokens for caption in captions)


def test_a_decoder_that_has_nothing_to_say_ends_at_once(case) -> None:
    decoder, features = case
    with torch.no_grad():
        decoder.vocabulary.bias[END] += 100
    for captions in said(decoder, features, beam=1):
        assert [caption.tokens for caption in captions] == [[END]]
