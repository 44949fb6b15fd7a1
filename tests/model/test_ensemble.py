import pytest
import torch
from tiny_decoders import FIRST_WORD, IMAGES, STRATEGIES, peaked_decoder
from torch import nn

from captionscale.model.search.constraints import Constraints
from captionscale.model.search.ensemble import Ensemble, EnsembleDecoder
from captionscale.vocab import START

RULES = Constraints(no_repeat_ngram_size=2, prefix=(FIRST_WORD + 1,))


@torch.no_grad()
def test_two_say_the_next_word_by_the_mean_of_their_probabilities() -> None:
    (one, features), (other, _) = peaked_decoder("attention", 0, 9), peaked_decoder("top_down", 1, 9)
    # Of another encoder: other regions, and more of them.
    theirs = torch.randn(IMAGES, 7, 6)
    both = EnsembleDecoder([one, other])
    state, apart = both.start((features, theirs)), [one.start(features), other.start(theirs)]
    for token in (START, FIRST_WORD, FIRST_WORD + 3):
        tokens = torch.full((IMAGES,), token)
        logits, state, attention = both.step(tokens, state)
        first, apart[0], _ = one.step(tokens, apart[0])
        second, apart[1], _ = other.step(tokens, apart[1])
        assert torch.allclose(logits.exp(), (first.softmax(1) + second.softmax(1)) / 2, atol=1e-6)
        assert attention is None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("copies", [1, 2])
def test_an_ensemble_of_one_or_of_twice_the_same_writes_as_it_does(strategy, copies) -> None:
    for name in ("plain", "attention"):
        decoder, features = peaked_decoder(name, 0, 9)
        torch.manual_seed(5)
        alone = STRATEGIES[strategy](decoder, features, RULES, 7)
        torch.manual_seed(5)
        together = EnsembleDecoder([decoder] * copies)
        assert STRATEGIES[strategy](together, (features,) * copies, RULES, 7) == alone


def test_required_words_and_early_ends_reorder_all_members_states() -> None:
    (one, features), (other, _) = peaked_decoder("attention", 0, 9), peaked_decoder("plain", 1, 9)
    both, constraints = (
        EnsembleDecoder([one, other]),
        Constraints(required=((FIRST_WORD,), (FIRST_WORD + 4,))),
    )
    together = STRATEGIES["beam"](both, (features, features), constraints, 7)
    for number in range(IMAGES):
        image = features[number : number + 1]
        assert STRATEGIES["beam"](both, (image, image), constraints, 7) == [together[number]]


def test_an_ensembles_members_change_their_mode_together() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = peaked_decoder("plain", 0)[0]

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0].float() + self.training

    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    members = [Looks(), Looks()]
    ensemble = Ensemble.__new__(Ensemble)
    nn.Module.__init__(ensemble)
    ensemble._parts, ensemble._members = nn.ModuleList(members), members
    assert [each.max().item() for each in ensemble.train().encode(images)] == [1, 1]
    assert [each.max().item() for each in ensemble.eval().encode(images)] == [0, 0]
