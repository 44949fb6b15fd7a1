from collections.abc import Iterable
from contextlib import nullcontext

import pytest
import torch
from tiny_decoders import build_decoder
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from captionscale.model.decoders import recurrence
from captionscale.model.decoders.attention import AttentionDecoder
from captionscale.model.decoders.recurrent import RecurrentDecoder
from captionscale.vocab import PAD

WORDS, FEATURE, REGIONS, IMAGES = 11, 6, 4, 3
IMAGE_INDEX = torch.tensor([2, 0, 0, 2, 0, 2, 0])  # Image 1 has no caption; those of others are not adjacent.
LENGTHS = (4, 1, 6, 2, 6, 3, 4)
CHOICES = [
    {"num_layers": 1},
    {"num_layers": 2, "attention_gate": True, "word_head": "maxout", "region_size": 3},
    {"num_layers": 1, "attention_gate": True, "word_head": "linear", "tie_weights": True, "dropout": 0.4},
    {"num_layers": 3, "word_head": "linear", "dropout": 0.4, "variational_dropout": True, "region_size": 0},
]


def build(**choices: object) -> AttentionDecoder:
    torch.manual_seed(0)
    return build_decoder("attention", FEATURE, WORDS, **({"dropout": 0.0} | choices))


def image_features(images: int = IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, REGIONS, FEATURE, generator=generator, dtype=torch.float64).abs() * 3


def captions_of(lengths: Iterable[int] = LENGTHS, time: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    captions = [torch.randint(1, WORDS, (time,), generator=generator) for _ in lengths]
    for caption, length in zip(captions, lengths, strict=True):
        caption[length:] = PAD
    return torch.stack(captions)


class WordByWord(AttentionDecoder):
    """Reads by `recur`, through autograd."""

    recur_all = RecurrentDecoder.recur_all


def word_by_word(decoder: AttentionDecoder, *inputs: object) -> tuple[Tensor, Tensor]:
    return WordByWord.teacher_forced(_as(decoder, WordByWord), *inputs)


def _as(decoder: AttentionDecoder, kind: type) -> AttentionDecoder:
    decoder.__class__ = kind
    return decoder


def fused(decoder: AttentionDecoder, *inputs: object) -> tuple[Tensor, Tensor]:
    return AttentionDecoder.teacher_forced(_as(decoder, AttentionDecoder), *inputs)


def gradients(
    read: object,
    decoder: AttentionDecoder,
    features: Tensor,
    tokens: Tensor,
    image_index: Tensor,
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return logits and attention, and the gradient of what depends on both, where there are words."""
    words = tokens.ne(PAD).unsqueeze(2)
    decoder.zero_grad()
    features = features.to(decoder.embedding.weight.dtype).requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", precision) if precision else nullcontext():
        logits, attention = read(decoder, features, tokens, tokens.ne(PAD).sum(1).tolist(), image_index)
    weights = torch.linspace(0, 1, WORDS, dtype=features.dtype)
    said = (logits.to(features.dtype).log_softmax(1) * weights).sum()
    (said + (1 - (attention * words).sum(1)).square().sum()).backward()
    grads = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    results = {"logits": logits, "attention": attention * words, "features": features.grad, **grads}
    return {name: result.detach().double() for name, result in results.items()}


@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: "-".join(map(str, choices.values())))
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_results_and_gradients_are_those_of_reading_word_by_word(choices, dtype, rounding) -> None:
    decoder, captions = build(**choices).to(dtype), captions_of()
    for some in (slice(None), slice(1, 3), slice(1, 2), slice(0, 1)):
        for time in (captions.shape[1], 1):
            tokens, image_index = captions[some, :time], IMAGE_INDEX[some]
            expected = gradients(word_by_word, decoder, image_features(), tokens, image_index)
            found = gradients(fused, decoder, image_features(), tokens, image_index)
            assert expected["attention.key.weight"].abs().max() > 0
            for name, value in found.items():
                error = (value - expected[name]).abs().max()
                assert error <= rounding * (1 + expected[name].abs().max()), name


def test_in_bf16_it_is_as_close_to_exact_gradients_as_reading_word_by_word() -> None:
    decoder = build(num_layers=2, attention_gate=True, hidden_size=32, attention_size=32, embed_size=16)
    arguments = (image_features(), captions_of(), IMAGE_INDEX)
    rounded = gradients(word_by_word, decoder, *arguments, torch.bfloat16)
    found = gradients(fused, decoder, *arguments, torch.bfloat16)
    exact = gradients(word_by_word, decoder.double(), *arguments)
    for name, value in exact.items():
        assert (found[name] - value).norm() <= 1.5 * (rounded[name] - value).norm() + 0.01 * value.norm(), (
            name
        )


@pytest.mark.parametrize(("layers", "gate"), [(1, False), (2, True)])
def test_the_gradient_is_that_of_small_differences(layers, gate) -> None:
    decoder = build(
        num_layers=layers, attention_gate=gate, embed_size=2, hidden_size=2, attention_size=3, region_size=2
    ).double()
    tokens, image_index = captions_of((3, 1, 2), 3), torch.tensor([1, 0, 1])
    weights = [*decoder.attention.query.parameters(), *decoder.attention.energy.parameters()]
    weights += [*decoder.cells.parameters(), *(decoder.gate.parameters() if decoder.gate else ())]
    start = [part.detach().requires_grad_() for part in decoder.start(image_features(2))[:4]]
    words = decoder.embedding(tokens).detach().requires_grad_()

    def read(words: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = recurrence.AttentionState(*tensors[:4])
        return recurrence.fused_attention_lstm(
            words, (3, 1, 2), image_index, state, decoder.attention, decoder.gate, decoder.cells
        )

    assert torch.autograd.gradcheck(read, (words, *start, *weights))


def test_what_follows_the_end_of_a_caption_is_not_read() -> None:
    decoder, tokens = build(num_layers=2, attention_gate=True).double(), captions_of()
    _, attention = decoder.teacher_forced(image_features(), tokens, LENGTHS, IMAGE_INDEX)
    assert (attention.sum(2) - tokens.ne(PAD).double()).abs().max() < 1e-12


def test_reading_without_a_gradient_and_twice_backwards_change_nothing() -> None:
    decoder = build(num_layers=2, attention_gate=True).double()
    logits, attention = decoder.teacher_forced(image_features(), captions_of(), LENGTHS, IMAGE_INDEX)
    with torch.no_grad():
        again, _ = decoder.teacher_forced(image_features(), captions_of(), LENGTHS, IMAGE_INDEX)
    assert torch.equal(again, logits)
    for _ in range(2):
        attention.square().sum().backward(retain_graph=True)
    twice = decoder.attention.query.weight.grad
    decoder.zero_grad()
    attention.square().sum().backward()
    assert torch.equal(twice, 2 * decoder.attention.query.weight.grad)


def test_an_image_copied_for_each_caption_has_the_same_results_and_gradients() -> None:
    decoder = build(num_layers=2, attention_gate=True).double()
    expected = gradients(fused, decoder, image_features(), captions_of(), IMAGE_INDEX)
    copies, own = image_features()[IMAGE_INDEX], torch.arange(len(IMAGE_INDEX))
    found = gradients(fused, decoder, copies, captions_of(), own)
    found["features"] = torch.zeros_like(expected["features"]).index_add(0, IMAGE_INDEX, found["features"])
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_on_a_gpu_the_host_never_waits_for_a_value() -> None:
    # Tensors without values, for which asking for one is an error.
    with FakeTensorMode(), torch.device("cuda"):
        decoder = build(num_layers=2, attention_gate=True)
        features, tokens = torch.empty(IMAGES, REGIONS, FEATURE), torch.empty(6, 7, dtype=torch.long)
        logits, attention = decoder.teacher_forced(
            features, tokens, (7, 7, 3, 2, 1, 7), torch.empty(6, dtype=torch.long)
        )
        assert (logits.shape, attention.shape) == ((27, WORDS), (6, 7, REGIONS))
        with pytest.raises(DataDependentOutputException):
            tokens.max().item()
