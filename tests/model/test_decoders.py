from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from captionscale.config import Decoder
from captionscale.model.attention import AdditiveAttention
from captionscale.model.decoders import DECODERS, AttentionDecoder, PlainDecoder, select

WORDS, FEATURE, REGIONS, IMAGES, TIMES = 11, 6, 4, 3, 5
OWNERS = torch.tensor([2, 0, 0, 1, 2, 0])

Make = Callable[..., PlainDecoder | AttentionDecoder]


def build(name: str, layers: int = 2, dropout: float = 0.0) -> PlainDecoder | AttentionDecoder:
    torch.manual_seed(0)
    settings = Decoder(name=name, embed=5, hidden=7, attend=8, layers=layers, dropout=dropout)
    return DECODERS[name](settings, FEATURE, WORDS)


@pytest.fixture(
    params=[(name, layers) for name in DECODERS for layers in (1, 2)], ids=lambda p: f"{p[0]}{p[1]}"
)
def decoder(request: pytest.FixtureRequest) -> PlainDecoder | AttentionDecoder:
    return build(*request.param).eval()


@pytest.fixture
def features() -> Tensor:
    return torch.randn(IMAGES, REGIONS, FEATURE, generator=torch.Generator().manual_seed(1)).abs() * 3


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, WORDS, (len(OWNERS), TIMES), generator=torch.Generator().manual_seed(2))


def test_reading_word_by_word_says_what_reading_at_once_says(decoder, features, tokens) -> None:
    at_once, looks = decoder(features, tokens, OWNERS)
    state = select(decoder.start(features), OWNERS)
    for time in range(TIMES):
        logits, state, look = decoder.step(tokens[:, time], state)
        torch.testing.assert_close(logits, at_once[:, time])
        assert (look is None) == (looks is None)
        if look is not None:
            torch.testing.assert_close(look, looks[:, time])


def test_attention_is_a_share_of_each_region(features, tokens) -> None:
    _, looks = build("attention")(features, tokens, OWNERS)
    assert looks.shape == (len(OWNERS), TIMES, REGIONS)
    assert (looks >= 0).all()
    torch.testing.assert_close(looks.sum(2), torch.ones(len(OWNERS), TIMES))


def test_a_caption_does_not_know_the_others_of_its_batch(decoder, features, tokens) -> None:
    together, _ = decoder(features, tokens, OWNERS)
    for row, owner in enumerate(OWNERS):
        alone, _ = decoder(features[owner : owner + 1], tokens[row : row + 1], torch.tensor([0]))
        torch.testing.assert_close(together[row], alone[0])


def test_no_logit_knows_a_later_word(decoder, features, tokens) -> None:
    before, _ = decoder(features, tokens, OWNERS)
    for time in range(1, TIMES):
        changed = tokens.clone()
        changed[:, time:] = changed[:, time:] % (WORDS - 1) + 1
        after, _ = decoder(features, changed, OWNERS)
        torch.testing.assert_close(after[:, :time], before[:, :time])
        assert (after[:, time] - before[:, time]).abs().amax(1).min() > 1e-4


def test_a_caption_sees_its_own_image_and_no_other(decoder, features, tokens) -> None:
    before, _ = decoder(features, tokens, OWNERS)
    for image in range(IMAGES):
        changed = features.clone()
        changed[image] += 1
        after, _ = decoder(changed, tokens, OWNERS)
        moved = (after - before).abs().flatten(1).amax(1) > 1e-5
        assert moved.tolist() == OWNERS.eq(image).tolist()


def test_select_repeats_and_reorders_all_of_a_state(decoder, features) -> None:
    state = decoder.start(features)
    rows = torch.tensor([1, 1, 0, 2, 0])
    for part, chosen in zip(state, select(state, rows), strict=True):
        assert torch.equal(chosen, torch.stack([part[row] for row in rows]))


def test_gradients_reach_every_parameter(decoder, features, tokens) -> None:
    logits, _ = decoder.train()(features, tokens, OWNERS)
    logits.logsumexp(2).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", DECODERS)
def test_dropout_hides_in_training_only(name, features, tokens) -> None:
    decoder = build(name, dropout=0.5)
    without, _ = build(name)(features, tokens, OWNERS)
    torch.testing.assert_close(decoder.eval()(features, tokens, OWNERS)[0], without)
    assert not torch.allclose(decoder.train()(features, tokens, OWNERS)[0], without)


def test_the_plain_decoder_is_an_lstm_that_reads_the_picture_as_its_first_word(features, tokens) -> None:
    decoder = build("plain", layers=1).eval()
    lstm = nn.LSTM(5, 7, batch_first=True)
    lstm.load_state_dict(decoder.lstm.state_dict())
    pictures = features.mean(1) @ decoder.picture.weight.T + decoder.picture.bias
    sentence = torch.cat([pictures[OWNERS].unsqueeze(1), decoder.embedding.weight[tokens]], 1)
    outputs, _ = lstm(sentence)
    expected = outputs[:, 1:] @ decoder.vocabulary.weight.T + decoder.vocabulary.bias
    torch.testing.assert_close(decoder(features, tokens, OWNERS)[0], expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_attention_decoder_is_the_recurrence_that_its_docstring_states(features, tokens, layers) -> None:
    decoder = build("attention", layers).eval()
    regions = decoder.regions(features[:1]).relu()
    first_states = torch.tanh(decoder.first_states(regions.mean(1))).chunk(2 * layers, 1)
    hidden, cell = list(first_states[:layers]), list(first_states[layers:])
    expected = []
    for token in tokens[0]:
        word = decoder.embedding.weight[token].unsqueeze(0)
        context, _ = decoder.attention(regions, decoder.attention.keys(regions), hidden[-1])
        below = torch.cat([word, context], 1)
        for layer in range(layers):
            below, cell[layer] = decoder.cells[layer](below, (hidden[layer], cell[layer]))
            hidden[layer] = below
        deep = word + decoder.from_hidden(below) + decoder.from_context(context)
        expected.append(decoder.vocabulary(deep))
    logits, _ = decoder(features[:1], tokens[:1], torch.tensor([0]))
    torch.testing.assert_close(logits[0], torch.cat(expected))


def test_additive_attention_is_the_formula_of_bahdanau() -> None:
    attention = AdditiveAttention(feature=2, hidden=1, attend=2)
    with torch.no_grad():
        attention.key.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        attention.key.bias.copy_(torch.tensor([0.0, -1.0]))
        attention.query.weight.copy_(torch.tensor([[0.5], [1.0]]))
        attention.energy.weight.copy_(torch.tensor([[2.0, -1.0]]))
    features = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])
    context, weights = attention(features, attention.keys(features), torch.tensor([[-1.0]]))
    # Keys (1, 0) and (0, 1); query (-0.5, -1): energies 2 tanh(0.5) - tanh(-1) and 2 tanh(-0.5) - tanh(0),
    # that is 1.6858284 and -0.9242343; their difference 2.6100627 through the logistic function: 0.931506.
    torch.testing.assert_close(weights, torch.tensor([[0.931506, 0.068494]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(context, torch.tensor([[0.931506, 0.534247]]), atol=1e-5, rtol=0)
