import pytest
import torch
from torch import Tensor, nn

from captionscale.config import Decoder
from captionscale.model.decoders.registry import DECODERS
from captionscale.model.decoders.scheduled_sampling import scheduled_sampling_forward
from captionscale.vocab import END, PAD, START, UNK

WORDS, FEATURE, REGIONS, IMAGES = 9, 6, 4, 3
IMAGE_INDEX = torch.tensor([2, 0, 0, 1, 2, 0])


def build(name: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_size": 5, "hidden_size": 7, "attention_size": 8, "dropout": 0.0}
    return DECODERS[name](Decoder(**{"name": name, **sizes, **more}), FEATURE, WORDS)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(IMAGES, REGIONS, FEATURE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> Tensor:
    """Captions of two to seven words."""
    tokens = torch.randint(UNK, WORDS, (len(IMAGE_INDEX), 8), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = START
    for row, caption in enumerate(tokens):
        caption[3 + row :] = PAD
    return tokens


class Told(nn.Module):
    """A decoder that notes what it reads, and says always the same."""

    def __init__(self, chances: list[float]):
        super().__init__()
        self.logits, self.read = nn.Parameter(torch.tensor(chances).log()), []

    def start(self, features: Tensor) -> tuple[Tensor, ...]:
        return (features[:, 0, 0],)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], None]:
        self.read.append(tokens)
        return self.logits.expand(len(tokens), -1), state, None


@pytest.mark.parametrize("name", DECODERS)
def test_rehearsing_with_the_references_words_alone_is_reading_them(name, features, tokens) -> None:
    decoder = build(name)
    said, looks = decoder.teacher_forced(features, tokens, IMAGE_INDEX)
    rehearsed, rehearsed_looks = scheduled_sampling_forward(decoder, features, tokens, IMAGE_INDEX, 0.0)
    words = tokens != PAD
    torch.testing.assert_close(rehearsed[words], said[words])
    assert (looks is None) == (rehearsed_looks is None)
    if looks is not None:
        torch.testing.assert_close(rehearsed_looks[words], looks[words])
    own, _ = scheduled_sampling_forward(decoder, features, tokens, IMAGE_INDEX, 1.0)
    torch.testing.assert_close(own[:, 0], said[:, 0])
    assert not torch.allclose(own, said)
    own.logsumexp(2).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_as_many_words_are_drawn_as_asked_for_and_as_often_as_they_are_said() -> None:
    chances = torch.tensor([0.3, 0.2, 0.1, 0.05, 0.2, 0.15])
    decoder = Told(chances.tolist())
    count, reference = 4000, 5
    tokens = torch.full((count, 6), reference)
    tokens[:, 0] = START
    tokens[: count // 2, 4:] = PAD
    torch.manual_seed(0)
    scheduled_sampling_forward(
        decoder, torch.zeros(1, 1, 1), tokens, torch.zeros(count, dtype=torch.long), 0.4
    )
    read = torch.stack(decoder.read, 1)
    assert (read[:, 0] == START).all()
    assert torch.equal(read == PAD, tokens == PAD)
    assert not (read[:, 1:] == START).any()
    # What may be drawn: all but padding and the start, half of what was said.
    words = read[:, 1:][tokens[:, 1:] != PAD]
    expected = 0.4 * chances / 0.5
    expected[[PAD, START]] = 0
    expected[reference] += 0.6
    torch.testing.assert_close(words.bincount(minlength=6) / len(words), expected, atol=0.015, rtol=0)
    assert expected[END] > 0
    # Each word is chosen for itself: as many rows as chance has it were drawn both here and there.
    both = ((read[:, 1] != reference) & (read[:, 2] != reference)).float().mean()
    torch.testing.assert_close(both, (1 - expected[reference]) ** 2, atol=0.02, rtol=0)


def test_no_gradient_flows_through_a_draw_and_a_loss_that_is_no_number_ends_nothing_here() -> None:
    decoder = Told([0.25] * 4)
    tokens, image_index = torch.tensor([[START, UNK, END]]), torch.tensor([0])
    said, _ = scheduled_sampling_forward(decoder, torch.zeros(1, 1, 1), tokens, image_index, 1.0)
    assert not any(word.requires_grad for word in decoder.read)
    said.sum().backward()
    assert decoder.logits.grad.tolist() == [3.0] * 4
    decoder.logits.data.fill_(torch.nan)
    said, _ = scheduled_sampling_forward(decoder, torch.zeros(1, 1, 1), tokens, image_index, 1.0)
    assert said.isnan().all()


@pytest.mark.parametrize("name", DECODERS)
def test_the_same_dropout_is_the_same_in_a_rehearsal(name, features, tokens) -> None:
    decoder = build(name, dropout=0.5, variational_dropout=True, embed_size=40).train()
    read: list[Tensor] = []
    decoder.dropout.register_forward_hook(lambda _, words, hidden: read.append(hidden / words[0]))
    scheduled_sampling_forward(decoder, features, torch.full_like(tokens, 4), IMAGE_INDEX, 0.5)
    words = [each.view(len(IMAGE_INDEX), 40) for each in read if each.shape[-1] == 40][::2]
    assert len(words) == tokens.shape[1]
    assert all(torch.equal(each, words[0]) for each in words)
    assert len({tuple(row.tolist()) for row in words[0]}) == len(IMAGE_INDEX)
