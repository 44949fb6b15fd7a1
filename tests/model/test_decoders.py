import pytest
import torch
from tiny_decoders import build_decoder
from torch import Tensor, nn

from captionscale import toml
from captionscale.config_model import DECODERS
from captionscale.errors import UserError

WORDS, FEATURE, REGIONS, IMAGES, TIMES = 11, 6, 4, 3, 5
IMAGE_INDEX = torch.tensor([2, 0, 0, 1, 2, 0])


def build(name: str, dropout: float = 0.0, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return build_decoder(name, FEATURE, WORDS, dropout=dropout, **options)


def read(decoder: nn.Module, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    return decoder.teacher_forced(features, tokens, [TIMES] * len(tokens), IMAGE_INDEX)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(IMAGES, REGIONS, FEATURE, generator=torch.Generator().manual_seed(1)).abs() * 3


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, WORDS, (len(IMAGE_INDEX), TIMES), generator=torch.Generator().manual_seed(2))


def test_regions_are_not_projected_with_region_size_zero(features) -> None:
    for name in ("attention", "top_down"):
        assert torch.equal(build(name, region_size=0).start(features).regions, features)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention", "top_down"])
def test_rows_of_an_image_share_regions_and_keys_without_gradient(name, features) -> None:
    decoder = build(name)
    state = decoder.select(decoder.start(features), IMAGE_INDEX)
    assert len(state.regions) == len(state.keys) == IMAGES


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("output", ["linear", "deep", "maxout"])
@pytest.mark.parametrize("tied", [False, True])
def test_options_choose_the_parameters_and_gradients_reach_them(name, output, tied, features, tokens) -> None:
    own = {
        "plain": {"image_batch_norm": True},
        "attention": {"attention_gate": True, "region_size": 3},
        "top_down": {"region_size": 3},
    }
    options = {"word_head": output, "tie_weights": tied, "variational_dropout": tied, "hidden_size": 16}
    decoder = build(name, dropout=0.2, **options, **own[name]).train()
    read(decoder, features, tokens)[0].logsumexp(1).sum().backward()
    shapes = [parameter.shape for parameter in decoder.parameters()]
    assert ((WORDS, 5) in shapes) + ((WORDS, 16) in shapes) == (1 if tied or output != "linear" else 2)
    assert sum(parameter.shape[:1] == (WORDS,) for parameter in decoder.parameters()) == (2 if tied else 3)
    for key, parameter in decoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


def test_a_tied_output_needs_no_projection_where_sizes_are_equal() -> None:
    assert "from_hidden.weight" in dict(
        build("attention", word_head="linear", tie_weights=True).named_parameters()
    )
    decoder = build("attention", word_head="linear", tie_weights=True, embed_size=64, hidden_size=64)
    assert "from_hidden.weight" not in dict(decoder.named_parameters())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("settings", "length"), [({}, 8.0), ({"tie_weights": True}, 1.0), ({"embedding_init": "unit_norm"}, 1.0)]
)
def test_vectors_of_words_begin_as_long_as_asked_and_tied_ones_as_an_output_does(
    name, settings, length
) -> None:
    lengths = build(name, embed_size=64, **settings).embedding.weight[1:].norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, length), rtol=0.4, atol=0)


def masks(decoder: nn.Module, features: Tensor, by_steps: bool) -> tuple[Tensor, Tensor]:
    """Return what dropout multiplied by: the vectors of all captions' words, and those of the output."""
    seen: list[Tensor] = []
    decoder.train().dropout.register_forward_hook(lambda _, read, hidden: seen.append(hidden / read[0]))
    tokens = torch.full((len(IMAGE_INDEX), TIMES), 4)
    if by_steps:
        state = decoder.select(decoder.start(features), IMAGE_INDEX)
        for word in tokens.unbind(1):
            _, state, _ = decoder.step(word, state)
    else:
        read(decoder, features, tokens)
    # All but the regions.
    seen = [
        mask.detach().round(decimals=3).view(len(IMAGE_INDEX), -1, 40)
        for mask in seen
        if mask.shape[-1] == 40
    ]
    return torch.cat(seen[::2], 1), torch.cat(seen[1::2], 1)


@pytest.mark.parametrize("by_steps", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_the_same_dropout_hides_the_same_at_all_words_of_a_caption_and_not_of_another(
    name, by_steps, features
) -> None:
    for mask in masks(
        build(name, dropout=0.5, variational_dropout=True, embed_size=40, tie_weights=True),
        features,
        by_steps,
    ):
        assert mask.shape == (len(IMAGE_INDEX), TIMES, 40)
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert (mask == mask[:, :1]).all()
        assert len({tuple(caption[0].tolist()) for caption in mask}) == len(IMAGE_INDEX)
    for mask in masks(build(name, dropout=0.5, embed_size=40), features, by_steps):
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert len({tuple(word.tolist()) for word in mask.flatten(0, 1)}) == len(IMAGE_INDEX) * TIMES


def test_image_batch_norm_uses_the_micro_batch_and_for_one_image_running_statistics(features) -> None:
    decoder = build("plain", image_batch_norm=True).train()
    vectors = decoder.image_projection(features.mean(1))
    mean, variance = vectors.mean(0), vectors.var(0, unbiased=False)
    torch.testing.assert_close(
        decoder._embed_image(features.mean(1)), (vectors - mean) / (variance + 1e-5).sqrt()
    )
    norm = decoder.image_batch_norm
    torch.testing.assert_close(norm.running_mean, 0.01 * mean)
    alone = decoder._embed_image(features[:1].mean(1))
    torch.testing.assert_close(alone, (vectors[:1] - norm.running_mean) / (norm.running_var + 1e-5).sqrt())
    torch.testing.assert_close(alone, decoder.eval()._embed_image(features[:1].mean(1)))


def test_attention_is_not_paid_by_a_gate_that_is_closed(features, tokens) -> None:
    decoder = build("attention", num_layers=1, attention_gate=True).eval()
    nn.init.constant_(decoder.gate.bias, -100)
    nn.init.zeros_(decoder.initial_state.weight)
    closed, attention = read(decoder, features, tokens)
    torch.testing.assert_close(attention.sum(2), torch.ones(len(IMAGE_INDEX), TIMES))
    torch.testing.assert_close(read(decoder, features + 1, tokens)[0], closed)
    nn.init.constant_(decoder.gate.bias, 100)
    opened, _ = read(decoder, features, tokens)
    assert not torch.allclose(opened, closed)
    without = build("attention", num_layers=1).eval()
    without.load_state_dict({key: value for key, value in decoder.state_dict().items() if "gate" not in key})
    torch.testing.assert_close(read(without, features, tokens)[0], opened)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("plain", "attention_gate=true"),
        ("top_down", "attention_gate=true"),
        ("plain", "attention_size=64"),
        ("plain", "region_size=8"),
        ("attention", "image_batch_norm=true"),
        ("top_down", "num_layers=2"),
    ],
)
def test_options_of_another_decoder_are_refused(name, change, tmp_path) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text('[data]\nshards = "shards"\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        toml.load(path, [f"model.decoder.name={name}", f"model.decoder.{change}"])
    error, key = str(caught.value), change.partition("=")[0]
    assert error.startswith(f"--set model.decoder.{change}: unknown key '{key}' with decoder '{name}'; ")
    assert error.endswith(" leave it out, or change model.decoder.name")
    assert "\n" not in error


def test_each_decoder_has_defaults_of_its_own_and_survives_a_round_trip(tmp_path) -> None:
    path = tmp_path / "experiment.toml"
    for name in DECODERS:
        path.write_text(f'[data]\nshards = "x"\n[model.decoder]\nname = "{name}"\n', encoding="utf-8")
        config = toml.load(path)
        path.write_text(toml.dumps(config), encoding="utf-8")
        assert toml.load(path) == config
        assert config.model.decoder.name == name
