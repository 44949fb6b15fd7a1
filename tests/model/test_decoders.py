import pytest
import torch
from torch import Tensor, nn

from captionscale import toml
from captionscale.config import Decoder
from captionscale.errors import UserError
from captionscale.model.decoders.registry import DECODERS
from captionscale.model.decoders.registry import Decoder as AnyDecoder
from captionscale.model.decoders.state import select

WORDS, FEATURE, REGIONS, IMAGES, TIMES = 11, 6, 4, 3, 5
IMAGE_INDEX = torch.tensor([2, 0, 0, 1, 2, 0])

CHOICES = [
    {"name": "plain", "num_layers": 1},
    {"name": "plain", "num_layers": 2, "word_head": "linear", "image_batch_norm": True},
    {"name": "attention", "num_layers": 1},
    {"name": "attention", "num_layers": 2, "word_head": "maxout", "attention_gate": True, "region_size": 3},
    {"name": "attention", "num_layers": 1, "word_head": "linear", "tie_weights": True, "region_size": 0},
    {"name": "top_down"},
    {"name": "top_down", "word_head": "maxout", "tie_weights": True, "region_size": 3},
]


def build(name: str, dropout: float = 0.0, **more: object) -> nn.Module:
    torch.manual_seed(0)
    settings = Decoder(
        **{"name": name, "embed_size": 5, "hidden_size": 7, "attention_size": 8, "dropout": dropout, **more}
    )
    return DECODERS[name](settings, FEATURE, WORDS)


@pytest.fixture(params=CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
def decoder(request: pytest.FixtureRequest) -> nn.Module:
    return build(**request.param).eval()


@pytest.fixture
def features() -> Tensor:
    return torch.randn(IMAGES, REGIONS, FEATURE, generator=torch.Generator().manual_seed(1)).abs() * 3


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, WORDS, (len(IMAGE_INDEX), TIMES), generator=torch.Generator().manual_seed(2))


def test_reading_word_by_word_says_what_reading_at_once_says(decoder, features, tokens) -> None:
    at_once, looks = decoder.teacher_forced(features, tokens, IMAGE_INDEX)
    state = select(decoder.start(features), IMAGE_INDEX)
    for time in range(TIMES):
        logits, state, look = decoder.step(tokens[:, time], state)
        torch.testing.assert_close(logits, at_once[:, time])
        assert (look is None) == (looks is None)
        if look is not None:
            torch.testing.assert_close(look, looks[:, time])


def test_logits_of_some_words_are_those_of_all_words_at_these_places(decoder, features, tokens) -> None:
    rows = torch.tensor([0, 3, 7, len(IMAGE_INDEX) * TIMES - 1])
    some, _ = decoder.teacher_forced(features, tokens, IMAGE_INDEX, rows)
    torch.testing.assert_close(
        some, decoder.teacher_forced(features, tokens, IMAGE_INDEX)[0].flatten(0, 1)[rows]
    )


def test_regions_that_are_not_projected_are_looked_at_as_they_are(features) -> None:
    for name in ("attention", "top_down"):
        assert torch.equal(build(name, region_size=0).start(features).regions, features)


def test_attention_is_a_share_of_each_region(features, tokens) -> None:
    _, looks = build("attention").teacher_forced(features, tokens, IMAGE_INDEX)
    assert looks.shape == (len(IMAGE_INDEX), TIMES, REGIONS)
    assert (looks >= 0).all()
    torch.testing.assert_close(looks.sum(2), torch.ones(len(IMAGE_INDEX), TIMES))


def test_a_caption_does_not_know_the_others_of_its_batch(decoder, features, tokens) -> None:
    together, _ = decoder.teacher_forced(features, tokens, IMAGE_INDEX)
    for row, owner in enumerate(IMAGE_INDEX):
        alone, _ = decoder.teacher_forced(
            features[owner : owner + 1], tokens[row : row + 1], torch.tensor([0])
        )
        torch.testing.assert_close(together[row], alone[0])


def test_no_logit_knows_a_later_word(decoder, features, tokens) -> None:
    before, _ = decoder.teacher_forced(features, tokens, IMAGE_INDEX)
    for time in range(1, TIMES):
        changed = tokens.clone()
        changed[:, time:] = changed[:, time:] % (WORDS - 1) + 1
        after, _ = decoder.teacher_forced(features, changed, IMAGE_INDEX)
        torch.testing.assert_close(after[:, :time], before[:, :time])
        assert (after[:, time] - before[:, time]).abs().amax(1).min() > 1e-4


def test_a_caption_sees_its_own_image_and_no_other(decoder, features, tokens) -> None:
    before, _ = decoder.teacher_forced(features, tokens, IMAGE_INDEX)
    for image in range(IMAGES):
        changed = features.clone()
        changed[image] += 1
        after, _ = decoder.teacher_forced(changed, tokens, IMAGE_INDEX)
        moved = (after - before).abs().flatten(1).amax(1) > 1e-5
        assert moved.tolist() == IMAGE_INDEX.eq(image).tolist()


def test_a_decoder_is_one_to_whoever_searches_and_a_word_is_not() -> None:
    assert isinstance(build("top_down"), AnyDecoder)
    assert not isinstance(nn.Embedding(3, 2), AnyDecoder)


def test_select_repeats_and_reorders_all_of_a_state_and_of_several(decoder, features) -> None:
    state = decoder.start(features)
    rows = torch.tensor([1, 1, 0, 2, 0])
    (one, (two,)) = select((state, (state,)), rows)
    for chosen in (select(state, rows), one, two):
        assert type(chosen) is type(state)
        for part, rest in zip(state, chosen, strict=True):
            if part == ():
                assert rest == ()
            else:
                assert torch.equal(rest, torch.stack([part[row] for row in rows]))


@torch.no_grad()
def test_rows_of_a_picture_share_what_they_look_at_without_gradient_and_say_the_same(
    decoder, features, tokens
) -> None:
    logits, state, look = decoder.step(tokens[:, 0], select(decoder.start(features), IMAGE_INDEX))
    if look is not None:
        assert len(state.regions) == len(state.keys) == IMAGES
    some = torch.tensor([5, 0, 0, 2])
    more, _, looks = decoder.step(tokens[some, 1], select(state, some))
    with torch.enable_grad():
        copied = select(decoder.start(features), IMAGE_INDEX)
        expected, copied, whole = decoder.step(tokens[:, 0], copied)
        after, _, wholes = decoder.step(tokens[some, 1], select(copied, some))
    torch.testing.assert_close((logits, more), (expected, after))
    torch.testing.assert_close((look, looks), (whole, wholes))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("output", ["linear", "deep", "maxout"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_gradients_reach_every_parameter(name, output, tied, same, features, tokens) -> None:
    own = {
        "plain": {"image_batch_norm": True},
        "attention": {"attention_gate": True, "region_size": 3},
        "top_down": {"region_size": 3},
    }
    decoder = build(
        name,
        dropout=0.2,
        word_head=output,
        tie_weights=tied,
        variational_dropout=same,
        hidden_size=16,
        **own[name],
    ).train()
    logits, _ = decoder.teacher_forced(features, tokens, IMAGE_INDEX)
    assert logits.shape == (len(IMAGE_INDEX), TIMES, WORDS)
    logits.logsumexp(2).sum().backward()
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


@pytest.mark.parametrize("name", DECODERS)
def test_dropout_hides_in_training_only(name, features, tokens) -> None:
    for same in (False, True):
        decoder = build(name, dropout=0.5, variational_dropout=same)
        without, _ = build(name).teacher_forced(features, tokens, IMAGE_INDEX)
        torch.testing.assert_close(decoder.eval().teacher_forced(features, tokens, IMAGE_INDEX)[0], without)
        assert not torch.allclose(decoder.train().teacher_forced(features, tokens, IMAGE_INDEX)[0], without)


def masks(decoder: nn.Module, features: Tensor, by_steps: bool) -> tuple[Tensor, Tensor]:
    """Return what dropout multiplied by: the vectors of all captions' words, and those of the output."""
    seen: list[Tensor] = []
    decoder.train().dropout.register_forward_hook(lambda _, read, hidden: seen.append(hidden / read[0]))
    tokens = torch.full((len(IMAGE_INDEX), TIMES), 4)
    if by_steps:
        state = select(decoder.start(features), IMAGE_INDEX)
        for word in tokens.unbind(1):
            _, state, _ = decoder.step(word, state)
    else:
        decoder.teacher_forced(features, tokens, IMAGE_INDEX)
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


def test_a_picture_is_normalised_over_its_micro_batch_and_alone_by_what_was_seen(features) -> None:
    decoder = build("plain", image_batch_norm=True).train()
    vectors = decoder.image_projection(features.mean(1))
    mean, variance = vectors.mean(0), vectors.var(0, unbiased=False)
    torch.testing.assert_close(decoder._see(features.mean(1)), (vectors - mean) / (variance + 1e-5).sqrt())
    norm = decoder.image_batch_norm
    torch.testing.assert_close(norm.running_mean, 0.01 * mean)
    alone = decoder._see(features[:1].mean(1))
    torch.testing.assert_close(alone, (vectors[:1] - norm.running_mean) / (norm.running_var + 1e-5).sqrt())
    torch.testing.assert_close(alone, decoder.eval()._see(features[:1].mean(1)))


def test_attention_is_not_paid_by_a_gate_that_is_closed(features, tokens) -> None:
    decoder = build("attention", num_layers=1, attention_gate=True).eval()
    nn.init.constant_(decoder.gate.bias, -100)
    nn.init.zeros_(decoder.initial_state.weight)
    closed, looks = decoder.teacher_forced(features, tokens, IMAGE_INDEX)
    torch.testing.assert_close(looks.sum(2), torch.ones(len(IMAGE_INDEX), TIMES))
    torch.testing.assert_close(decoder.teacher_forced(features + 1, tokens, IMAGE_INDEX)[0], closed)
    nn.init.constant_(decoder.gate.bias, 100)
    opened, _ = decoder.teacher_forced(features, tokens, IMAGE_INDEX)
    assert not torch.allclose(opened, closed)
    without = build("attention", num_layers=1).eval()
    without.load_state_dict({key: value for key, value in decoder.state_dict().items() if "gate" not in key})
    torch.testing.assert_close(without(features, tokens, IMAGE_INDEX)[0], opened)


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        ("plain", "attention_gate=true", "false"),
        ("top_down", "attention_gate=true", "false"),
        ("plain", "region_size=8", "none"),
        ("attention", "image_batch_norm=true", "false"),
        ("top_down", "image_batch_norm=true", "false"),
        ("top_down", "num_layers=1", "2"),
    ],
)
def test_what_a_decoder_cannot_have_is_refused(name, change, wanted) -> None:
    changes = [f"model.decoder.name={name}", "model.decoder.num_layers=2", f"model.decoder.{change}"]
    with pytest.raises(UserError) as caught:
        toml.load("quickstart", changes)
    assert (
        f"model.decoder.{change.replace('=', ' = ')}, wanted {wanted} with decoder '{name}', as only"
        in str(caught.value)
    )
    assert str(caught.value).endswith("leave it out, or change model.decoder.name")
    assert str(caught.value).count("\n") == 0
