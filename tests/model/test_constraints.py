import pytest
import torch
from tiny_decoders import FIRST_WORD, IMAGES, SEARCHES, STRATEGIES, peaked_decoder, strip_end

from captionscale.config_model import DECODERS
from captionscale.model.search.constraints import Constraints
from captionscale.model.search.generate import search
from captionscale.vocab import END, START, UNK

WORDS, MAX_WORDS = 16, 9


@pytest.fixture(params=DECODERS)
def case(request: pytest.FixtureRequest):
    """A decoder of sixteen words that likes long captions, and images."""
    decoder, features = peaked_decoder(request.param, 0, WORDS)
    with torch.no_grad():
        decoder.output_projection.bias[END] -= 2
    return decoder, features


def every(case, strategy: str, constraints: Constraints, max_words: int = MAX_WORDS) -> list[list[int]]:
    """Return all captions of all images."""
    found = STRATEGIES[strategy](*case, constraints, max_words)
    assert len(found) == IMAGES
    assert all(found)
    return [caption for captions in found for caption in captions]


def repeats(words: list[int], size: int) -> bool:
    ngrams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return len(set(ngrams)) < len(ngrams)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_caption_repeats_a_blocked_n_gram(case, strategy) -> None:
    loops = 0
    for size in (1, 2, 3):
        loops += sum(repeats(strip_end(caption), size) for caption in every(case, strategy, Constraints()))
        blocked = every(case, strategy, Constraints(no_repeat_ngram_size=size))
        assert not any(repeats(strip_end(caption), size) for caption in blocked)
    assert loops


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_caption_ends_in_a_dangling_word_finished_or_cut(case, strategy) -> None:
    dangling = tuple(range(FIRST_WORD, FIRST_WORD + WORDS // 2))

    def endings(constraints: Constraints, max_words: int) -> int:
        captions = [strip_end(caption) for caption in every(case, strategy, constraints, max_words)]
        return sum(bool(words) and words[-1] in dangling for words in captions)

    assert sum(endings(Constraints(), max_words) for max_words in range(1, 6))
    assert not sum(endings(Constraints(dangling_tokens=dangling), max_words) for max_words in range(1, 6))
    # The word itself may be said.
    assert any(
        {*dangling} & {*caption}
        for caption in every(case, strategy, Constraints(dangling_tokens=dangling), 5)
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_unknown_token_is_generated_only_if_allowed(case, strategy) -> None:
    with torch.no_grad():
        case[0].output_projection.bias[UNK] += 20
    assert not any(UNK in caption for caption in every(case, strategy, Constraints()))
    assert all(UNK in caption for caption in every(case, strategy, Constraints(allow_unknown=True)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_caption_begins_with_the_prefix_and_goes_on_as_after_it(case, strategy) -> None:
    prefix = (FIRST_WORD + 3, FIRST_WORD + 1, FIRST_WORD + 3)
    captions = every(case, strategy, Constraints(prefix=prefix))
    assert all(tuple(caption[:3]) == prefix for caption in captions)
    assert strategy == "greedy" or len({tuple(caption) for caption in captions}) > 1
    # What blocks repetitions does not object to the prefix itself, but to what comes after it.
    blocked = every(case, strategy, Constraints(prefix=prefix, no_repeat_ngram_size=1))
    assert all(tuple(caption[:3]) == prefix for caption in blocked)
    assert all(not {*caption[3:]} & {*prefix} and not repeats(caption[3:], 1) for caption in blocked)


@torch.no_grad()
def test_a_prefixs_probability_counts_as_that_of_any_words(case) -> None:
    decoder, features = case
    (captions, *_) = search(decoder, features, beam=3, max_words=5, length_penalty=0.7)
    tokens = captions[0].tokens
    constraints = Constraints(prefix=tuple(tokens[:2]))
    (forced, *_) = search(decoder, features, beam=3, max_words=5, length_penalty=0.7, constraints=constraints)
    same = next(caption for caption in forced if caption.tokens == tokens)
    assert same.log_prob == pytest.approx(captions[0].log_prob, abs=1e-4)


@pytest.mark.parametrize("strategy", SEARCHES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_caption_holds_the_required_words(case, strategy, count) -> None:
    required = tuple((FIRST_WORD + 2 * number, FIRST_WORD + 2 * number + 1) for number in range(count))
    constraints = Constraints(
        required=required, no_repeat_ngram_size=2, dangling_tokens=(FIRST_WORD, FIRST_WORD + 5)
    )
    for caption in every(case, strategy, constraints):
        assert all({*group} & {*caption} for group in required)
        assert not repeats(strip_end(caption), 2)
        assert strip_end(caption)[-1] not in constraints.dangling_tokens
    # There is no more space than for them and one word.
    for caption in every(case, strategy, constraints, max_words=count + 1):
        assert all({*group} & {*caption} for group in required)


def test_a_required_word_in_the_prefix_is_satisfied(case) -> None:
    constraints = Constraints(prefix=(FIRST_WORD + 2,), required=((FIRST_WORD + 2,),))
    plain = every(case, "beam", Constraints(prefix=constraints.prefix))
    assert every(case, "beam", constraints) == plain


@torch.no_grad()
def test_required_words_are_put_where_they_cost_least() -> None:
    """Against all captions that hold them, on a model where these can be counted out."""
    decoder, features = peaked_decoder("attention", 1, words=3)
    required = ((FIRST_WORD,), (FIRST_WORD + 1, FIRST_WORD + 2))
    constraints = Constraints(required=required)
    free = search(decoder, features, beam=500, max_words=4, length_penalty=0.0)
    wide = search(decoder, features, beam=500, max_words=4, length_penalty=0.0, constraints=constraints)
    for captions, held in zip(free, wide, strict=True):
        expected = [
            caption for caption in captions if all({*group} & {*caption.tokens} for group in required)
        ]
        assert {tuple(caption.tokens) for caption in held} == {tuple(caption.tokens) for caption in expected}
        assert held[0].tokens == expected[0].tokens
        assert held[0].log_prob == pytest.approx(expected[0].log_prob, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beam", [1, 2, 4])
@pytest.mark.parametrize("keen", [0, 6], ids=["", "to end"])
def test_each_set_of_required_words_has_a_beam_of_its_own(case, beam, keen) -> None:
    """Section 3.2 of Anderson et al. 2017, written out, without an end before all words are said."""
    decoder, features = case[0], case[1][:1]
    decoder.output_projection.bias[END] += keen
    required = ((FIRST_WORD,), (FIRST_WORD + 1, FIRST_WORD + 2))
    found = search(
        decoder,
        features,
        beam=beam,
        max_words=5,
        length_penalty=0.0,
        constraints=Constraints(required=required),
    )
    for image, captions in zip(features, found, strict=True):
        beams: dict[frozenset[int], dict[tuple[int, ...], float]] = {frozenset(): {(): 0.0}}
        for _ in range(5):
            longer: dict[frozenset[int], dict[tuple[int, ...], float]] = {}
            for said, kept in beams.items():
                for tokens, total in kept.items():
                    if END in tokens:
                        longer.setdefault(said, {})[tokens] = total
                        continue
                    read = torch.tensor([[START, *tokens]])
                    chances = decoder.teacher_forced(
                        image.unsqueeze(0), read, [read.shape[1]], torch.tensor([0])
                    )[0][-1].log_softmax(0)
                    for word in range(FIRST_WORD, FIRST_WORD + WORDS):
                        then = said | {number for number, group in enumerate(required) if word in group}
                        longer.setdefault(then, {})[(*tokens, word)] = total + chances[word].item()
                    if len(said) == len(required):
                        longer.setdefault(said, {})[(*tokens, END)] = total + chances[END].item()
            beams = {
                said: dict(sorted(each.items(), key=lambda pair: -pair[1])[:beam])
                for said, each in longer.items()
            }
        expected = beams[frozenset(range(len(required)))]
        assert {tuple(each.tokens): each.log_prob for each in captions} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("strategy", SEARCHES)
def test_many_images_at_once_get_under_rules_what_each_gets_alone(case, strategy) -> None:
    decoder, features = case
    constraints = Constraints(
        no_repeat_ngram_size=2,
        dangling_tokens=(FIRST_WORD,),
        prefix=(FIRST_WORD + 1,),
        required=((FIRST_WORD + 2,), (FIRST_WORD + 3,)),
    )
    together = SEARCHES[strategy](decoder, features, constraints, MAX_WORDS)
    for number in range(IMAGES):
        alone = SEARCHES[strategy](decoder, features[number : number + 1], constraints, MAX_WORDS)
        assert alone == [together[number]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_caption_ends_where_rules_leave_nothing_to_say(strategy) -> None:
    words = range(FIRST_WORD, FIRST_WORD + 3)
    constraints = Constraints(no_repeat_ngram_size=1, dangling_tokens=tuple(words))
    for caption in every(peaked_decoder("attention", 0), strategy, constraints, max_words=6):
        assert caption[-1] == END
        assert len({*caption}) == len(caption)
