"""Laws that every decoder keeps: a new line in the registry is tested here without another line of test."""

import pytest
import torch
from tiny_decoders import build_decoder
from torch import Tensor, nn

from captionscale.config_model import DECODERS, DecoderConfig
from captionscale.model.decoders.decoder import Decoder, StepDecoder, packed_index, scheduled_sampling
from captionscale.vocab import PAD, UNK

WORDS, FEATURE, REGIONS, IMAGES, TIME = 11, 6, 4, 3, 5
IMAGE_INDEX = torch.tensor([2, 0, 0, 1, 2, 0])
LENGTHS = (5, 3, 4, 1, 5, 2)


def build(name: str, **options: object) -> Decoder:
    """Return a decoder without dropout, in training mode."""
    torch.manual_seed(0)
    return build_decoder(name, FEATURE, WORDS, **options).train()


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return build(request.param).eval()


@pytest.fixture
def features() -> Tensor:
    return torch.randn(IMAGES, REGIONS, FEATURE, generator=torch.Generator().manual_seed(1)).abs() * 3


@pytest.fixture
def tokens() -> Tensor:
    shape, generator = (len(IMAGE_INDEX), TIME), torch.Generator().manual_seed(2)
    tokens = torch.randint(UNK, WORDS, shape, generator=generator)
    return tokens.masked_fill(torch.arange(TIME) >= torch.tensor(LENGTHS).unsqueeze(1), PAD)


def read(decoder: Decoder, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    return decoder.teacher_forced(features, tokens, LENGTHS, IMAGE_INDEX)


def by_caption(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(LENGTHS)


def test_it_is_what_search_and_the_config_expect(decoder) -> None:
    assert isinstance(decoder, StepDecoder)
    assert not isinstance(nn.Embedding(3, 2), StepDecoder)
    assert issubclass(decoder.Config, DecoderConfig)
    assert isinstance(decoder.config, decoder.Config)


def test_step_by_step_equals_teacher_forcing(decoder, features, tokens) -> None:
    logits, attention = read(decoder, features, tokens)
    assert logits.shape == (sum(LENGTHS), WORDS)
    state = decoder.select(decoder.start(features), IMAGE_INDEX)
    for time in range(TIME):
        step_logits, state, step_attention = decoder.step(tokens[:, time], state)
        for row, caption in enumerate(by_caption(logits)):
            if time < LENGTHS[row]:
                torch.testing.assert_close(step_logits[row], caption[time])
                if attention is not None:
                    torch.testing.assert_close(step_attention[row], attention[row, time])
        assert (step_attention is None) == (attention is None) == (not decoder.Config.has_attention)


def test_attention_weights_are_non_negative_and_sum_to_one(decoder, features, tokens) -> None:
    _, attention = read(decoder, features, tokens)
    if attention is not None:
        assert attention.shape == (len(IMAGE_INDEX), TIME, REGIONS)
        weights = attention.flatten(0, 1)[packed_index(LENGTHS, TIME, attention.device)]
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


def test_a_caption_depends_on_its_image_and_its_past_only(decoder, features, tokens) -> None:
    before = by_caption(read(decoder, features, tokens)[0])
    for row, image in enumerate(IMAGE_INDEX):
        length = LENGTHS[row]
        alone = tokens[row : row + 1, :length]
        logits, _ = decoder.teacher_forced(features[image : image + 1], alone, [length], torch.tensor([0]))
        torch.testing.assert_close(logits, before[row])
    for image in range(IMAGES):
        changed = features.clone()
        changed[image] += 1
        after = by_caption(read(decoder, changed, tokens)[0])
        moved = [bool((new - old).abs().max() > 1e-5) for new, old in zip(after, before, strict=True)]
        assert moved == IMAGE_INDEX.eq(image).tolist()
    for time in range(1, TIME):
        changed = tokens.clone()
        changed[:, time:] = torch.where(tokens[:, time:] == PAD, PAD, tokens[:, time:] % (WORDS - 1) + 1)
        for row, caption in enumerate(by_caption(read(decoder, features, changed)[0])):
            torch.testing.assert_close(caption[:time], before[row][:time])
            if time < LENGTHS[row]:
                assert (caption[time] - before[row][time]).abs().max() > 1e-4


@pytest.mark.parametrize("gradient", [False, True])
def test_select_repeats_and_reorders_rows(decoder, features, tokens, gradient) -> None:
    with torch.set_grad_enabled(gradient):
        _, state, _ = decoder.step(tokens[:, 0], decoder.select(decoder.start(features), IMAGE_INDEX))
        whole, _, _ = decoder.step(tokens[:, 1], state)
        rows = torch.tensor([5, 0, 0, 2])
        for chosen in (
            decoder.select(state, rows),
            decoder.select(decoder.select(state, rows[[1, 0, 3]]), torch.tensor([1, 0, 0, 2])),
        ):
            some, _, _ = decoder.step(tokens[rows, 1], chosen)
            torch.testing.assert_close(some, whole[rows])


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_reach_every_parameter(name, features, tokens) -> None:
    decoder = build(name)
    logits, _ = read(decoder, features, tokens)
    logits.logsumexp(1).sum().backward()
    for key, parameter in decoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", DECODERS)
def test_dropout_works_in_training_only_and_can_be_switched_off(name, features, tokens) -> None:
    decoder = build(name)
    expected, _ = read(decoder.eval(), features, tokens)
    if "dropout" in decoder.Config.model_fields:
        assert not torch.allclose(read(decoder.train(), features, tokens)[0], expected)
    torch.testing.assert_close(read(decoder.without_dropout().train(), features, tokens)[0], expected)


def test_scheduled_sampling_without_sampling_equals_teacher_forcing(decoder, features, tokens) -> None:
    inputs = (decoder, features, tokens, LENGTHS, IMAGE_INDEX)
    expected, _ = read(decoder, features, tokens)
    torch.testing.assert_close(scheduled_sampling(*inputs, 0.0)[0], expected)
    torch.manual_seed(0)
    sampled, _ = scheduled_sampling(*inputs, 1.0)
    for caption, reference in zip(by_caption(sampled), by_caption(expected), strict=True):
        torch.testing.assert_close(caption[0], reference[0])
    assert not torch.allclose(sampled, expected)
    sampled.logsumexp(1).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
