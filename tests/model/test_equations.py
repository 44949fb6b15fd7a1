"""The decoders against their papers' equations, written out in NumPy for one caption of one image."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_decoders import build_decoder
from torch import Tensor

from captionscale.model.decoders.additive_attention import AdditiveAttention

WORDS, FEATURE, REGIONS = 6, 3, 2
SIZES = {"embed_size": 2, "hidden_size": 3, "attention_size": 4, "dropout": 0.5}

Array = NDArray[np.float64]
Memory = list[tuple[Array, Array]]


class Weights:
    """A decoder's weights by their names, and the layers that papers make of them."""

    def __init__(self, decoder: torch.nn.Module):
        self.arrays = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}

    def __contains__(self, layer: str) -> bool:
        return f"{layer}.weight" in self.arrays

    def linear(self, layer: str, vector: Array) -> Array:
        return vector @ self.arrays[f"{layer}.weight"].T + self.arrays.get(f"{layer}.bias", 0)

    def lstm(
        self, layer: str, vector: Array, memory: tuple[Array, Array], suffix: str = ""
    ) -> tuple[Array, Array]:
        """Equations 1 to 3 of Xu et al., with the gates in torch's order: input, forget, cell, output."""
        hidden, cell = memory
        gates = 0.0
        for kind, read in (("ih", vector), ("hh", hidden)):
            gates = gates + self.arrays[f"{layer}.weight_{kind}{suffix}"] @ read
            gates = gates + self.arrays[f"{layer}.bias_{kind}{suffix}"]
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(cell), cell

    def attention(self, regions: Array, hidden: Array) -> Array:
        keys = self.linear("attention.key", regions)
        energies = np.array(
            [
                self.linear("attention.energy", np.tanh(key + self.linear("attention.query", hidden)))[0]
                for key in keys
            ]
        )
        weights = np.exp(energies) / np.exp(energies).sum()
        return sum(weight * region for weight, region in zip(weights, regions, strict=True))

    def output(self, kind: str, tied: bool, word: Array, hidden: Array, context: Array | None) -> Array:
        if kind == "linear":
            reading = self.linear("from_hidden", hidden) if "from_hidden" in self else hidden
        else:
            reading = self.linear("from_hidden", hidden)
            reading = reading + (self.linear("from_word", word) if kind == "maxout" else word)
            if context is not None:
                reading = reading + self.linear("from_context", context)
        if kind == "maxout":
            reading = np.array([max(reading[i], reading[i + 1]) for i in range(0, len(reading), 2)])
        matrix = self.arrays["embedding.weight" if tied else "output_projection.weight"]
        return matrix @ reading + self.arrays["output_projection.bias"]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def plain(
    weights: Weights, settings: Any, regions: Array, words: Array
) -> Iterator[tuple[Array, Array, None]]:
    """Vinyals et al., equations 10 to 12."""
    zero = np.zeros(settings.hidden_size)
    memory: Memory = [(zero, zero)] * settings.num_layers
    image = weights.linear("image_projection", regions.mean(0))
    if settings.image_batch_norm:
        scale, mean, variance, shift = (
            weights.arrays[f"image_batch_norm.{name}"]
            for name in ("weight", "running_mean", "running_var", "bias")
        )
        image = scale * (image - mean) / np.sqrt(variance + 1e-5) + shift
    for time, vector in enumerate([image, *words]):
        below = vector
        for layer in range(settings.num_layers):
            memory[layer] = weights.lstm("lstm", below, memory[layer], suffix=f"_l{layer}")
            below = memory[layer][0]
        if time:
            yield vector, below, None


def attention(weights: Weights, settings: Any, regions: Array, words: Array) -> Iterator[tuple[Array, ...]]:
    """Xu et al., equations 1 to 7 and section 4.2.1, on regions that were projected."""
    regions = np.maximum(weights.linear("region_projection", regions), 0)
    first = np.tanh(weights.linear("initial_state", regions.mean(0)))
    hidden, cell = first.reshape(2, settings.num_layers, settings.hidden_size)
    memory: Memory = list(zip(hidden, cell, strict=True))
    for word in words:
        before = memory[-1][0]
        context = weights.attention(regions, before)
        if settings.attention_gate:
            context = sigmoid(weights.linear("gate", before)) * context
        below = np.concatenate([word, context])
        for layer in range(settings.num_layers):
            memory[layer] = weights.lstm(f"cells.{layer}", below, memory[layer])
            below = memory[layer][0]
        yield word, below, context


def top_down(weights: Weights, settings: Any, regions: Array, words: Array) -> Iterator[tuple[Array, ...]]:
    """Anderson et al., equations 1 to 7, on regions that were projected."""
    regions = np.maximum(weights.linear("region_projection", regions), 0)
    first = second = (np.zeros(settings.hidden_size), np.zeros(settings.hidden_size))
    for word in words:
        first = weights.lstm("attention_lstm", np.concatenate([second[0], regions.mean(0), word]), first)
        context = weights.attention(regions, first[0])
        second = weights.lstm("language_lstm", np.concatenate([context, first[0]]), second)
        yield word, second[0], context


PAPERS = {"plain": plain, "attention": attention, "top_down": top_down}

CASES = [
    {"name": name, "word_head": output, "tie_weights": tied, **more}
    for name, choices in {
        "plain": [{"num_layers": 1}, {"num_layers": 2, "image_batch_norm": True}],
        "attention": [
            {"num_layers": 1},
            {"num_layers": 2, "attention_gate": True, "region_size": 5},
            {"num_layers": 1, "hidden_size": 2},
        ],
        "top_down": [{}, {"region_size": 5}],
    }.items()
    for more, output, tied in product(choices, ("linear", "deep", "maxout"), (False, True))
]


@pytest.mark.parametrize("choices", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_decoder_is_what_its_paper_writes(choices) -> None:
    torch.manual_seed(0)
    sizes = {
        key: value for key, value in SIZES.items() if choices["name"] != "plain" or key != "attention_size"
    }
    decoder = build_decoder(feature_size=FEATURE, vocab_size=WORDS, **(sizes | choices)).double().eval()
    settings = decoder.config
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    if settings.name == "plain" and settings.image_batch_norm:
        decoder.image_batch_norm.running_mean.uniform_()
        decoder.image_batch_norm.running_var.uniform_(0.5, 2)
    regions = torch.randn(1, REGIONS, FEATURE, dtype=torch.float64)
    tokens = torch.tensor([[1, 4, 5, 4]])
    weights = Weights(decoder)
    words = weights.arrays["embedding.weight"][tokens[0].numpy()]
    with torch.no_grad():
        logits, _ = decoder.teacher_forced(regions, tokens, [4], torch.tensor([0]))
    expected = [
        weights.output(settings.word_head, settings.tie_weights, *parts)
        for parts in PAPERS[settings.name](weights, settings, regions[0].numpy(), words)
    ]
    np.testing.assert_allclose(logits.numpy(), np.stack(expected), rtol=1e-9, atol=1e-12)


def test_additive_attention_is_the_formula_of_bahdanau() -> None:
    attention = AdditiveAttention(feature_size=2, hidden_size=1, attention_size=2)
    with torch.no_grad():
        attention.key.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        attention.key.bias.copy_(torch.tensor([0.0, -1.0]))
        attention.query.weight.copy_(torch.tensor([[0.5], [1.0]]))
        attention.energy.weight.copy_(torch.tensor([[2.0, -1.0]]))
    features = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])
    context, weights = attention(features, attention.key(features), torch.tensor([[-1.0]]))
    # Keys (1, 0) and (0, 1); query (-0.5, -1): energies 2 tanh(0.5) - tanh(-1) and 2 tanh(-0.5) - tanh(0),
    # that is 1.6858284 and -0.9242343; their difference 2.6100627 through the logistic function: 0.931506.
    torch.testing.assert_close(weights, torch.tensor([[0.931506, 0.068494]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(context, torch.tensor([[0.931506, 0.534247]]), atol=1e-5, rtol=0)


def test_a_plain_lstm_has_the_results_computed_by_hand() -> None:
    # All weights 1 and all biases 0, but the output's: image 1, so that each gate is of 1 and then of the
    # word's vector 2 plus the state.
    decoder = build_decoder(
        "plain", 1, 2, embed_size=1, hidden_size=1, num_layers=1, word_head="linear", dropout=0.0
    )
    for name, parameter in decoder.named_parameters():
        torch.nn.init.constant_(parameter, 0.0 if "bias" in name else 1.0)
    with torch.no_grad():
        decoder.embedding.weight.fill_(2.0)
        decoder.output_projection.weight.copy_(torch.tensor([[1.0], [-3.0]]))
    logits, _ = decoder.teacher_forced(
        torch.tensor([[[0.5], [1.5]]]), torch.tensor([[1]]), [1], torch.tensor([0])
    )
    # sigmoid(1) = 0.731059, tanh(1) = 0.761594: cell 0.556770, state 0.731059 tanh(0.556770) = 0.369606.
    # Gates of 2.369606: sigmoid 0.914480, tanh 0.982661; cell 0.914480 (0.556770 + 0.982661) = 1.407779,
    # state 0.914480 tanh(1.407779) = 0.811163.
    torch.testing.assert_close(logits, torch.tensor([[0.811163, -2.433490]]), atol=1e-5, rtol=0)


def spread(shape: Sequence[int], place: int) -> Tensor:
    """Return numbers between -2 and 2 that are a function of a weight's place."""
    return 2 * torch.sin(torch.arange(float(np.prod(shape))) * 1.7 + place).reshape(shape)


def test_a_checkpoint_older_than_the_options_loads_and_has_the_same_results() -> None:
    decoder = build_decoder("attention", FEATURE, WORDS, embed_size=2, hidden_size=3, attention_size=4).eval()
    state = decoder.state_dict()
    assert " ".join(state) == (
        "embedding.weight region_projection.weight region_projection.bias"
        " attention.key.weight attention.key.bias"
        " attention.query.weight attention.energy.weight initial_state.weight initial_state.bias"
        " cells.0.weight_ih cells.0.weight_hh cells.0.bias_ih cells.0.bias_hh"
        " cells.1.weight_ih cells.1.weight_hh cells.1.bias_ih cells.1.bias_hh"
        " from_hidden.weight from_hidden.bias from_context.weight"
        " output_projection.weight output_projection.bias"
    )
    weights = {name: spread(tensor.shape, place) for place, (name, tensor) in enumerate(state.items())}
    decoder.load_state_dict(weights)
    with torch.no_grad():
        logits, attention = decoder.teacher_forced(
            spread((1, REGIONS, FEATURE), 20), torch.tensor([[1, 4]]), [2], torch.tensor([0])
        )
    # What the decoder said at d2899013.
    expected = [
        [13.0745239, -8.3689251, 0.9256929, 4.3369813, -6.5519328, 9.8628101],
        [17.7409134, -12.1691771, 3.6074581, 2.9517908, -6.5552807, 11.2544928],
    ]
    torch.testing.assert_close(logits, torch.tensor(expected), atol=2e-5, rtol=0)
    expected = [[0.4921876, 0.5078124], [0.2524673, 0.7475327]]
    torch.testing.assert_close(attention[0], torch.tensor(expected), atol=1e-6, rtol=0)
