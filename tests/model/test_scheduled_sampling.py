import pytest
import torch
from tiny_decoders import build_decoder
from torch import Tensor, nn

from captionscale.config_model import DECODERS
from captionscale.model.decoders.decoder import scheduled_sampling
from captionscale.vocab import END, PAD, START, UNK

IMAGE_INDEX = torch.tensor([2, 0, 0, 1, 2, 0])


class Recorder(nn.Module):
    """A decoder that records what it reads and always returns the same logits."""

    def __init__(self, chances: list[float]):
        super().__init__()
        self.logits, self.read = nn.Parameter(torch.tensor(chances).log()), []

    def start(self, features: Tensor) -> tuple[Tensor, ...]:
        return (features[:, 0, 0],)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], None]:
        self.read.append(tokens)
        return self.logits.expand(len(tokens), -1), state, None

    def select(self, state: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
        assert len(rows)
        return state


def test_words_are_sampled_with_the_given_probability_and_the_decoders_distribution() -> None:
    chances = torch.tensor([0.3, 0.2, 0.1, 0.05, 0.2, 0.15])
    decoder = Recorder(chances.tolist())
    count, reference = 4000, 5
    tokens = torch.full((count, 6), reference)
    tokens[:, 0] = START
    tokens[: count // 2, 4:] = PAD
    torch.manual_seed(0)
    scheduled_sampling(
        decoder, torch.zeros(1, 1, 1), tokens, [6] * count, torch.zeros(count, dtype=torch.long), 0.4
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
    decoder = Recorder([0.25] * 4)
    tokens, image_index = torch.tensor([[START, UNK, END]]), torch.tensor([0])
    said, _ = scheduled_sampling(decoder, torch.zeros(1, 1, 1), tokens, [3], image_index, 1.0)
    assert not any(word.requires_grad for word in decoder.read)
    said.sum().backward()
    assert decoder.logits.grad.tolist() == [3.0] * 4
    decoder.logits.data.fill_(torch.nan)
    said, _ = scheduled_sampling(decoder, torch.zeros(1, 1, 1), tokens, [3], image_index, 1.0)
    assert said.isnan().all()


@pytest.mark.parametrize("name", DECODERS)
def test_the_same_dropout_holds_in_scheduled_sampling(name) -> None:
    decoder = build_decoder(name, 6, 9, dropout=0.5, variational_dropout=True, embed_size=40).train()
    read: list[Tensor] = []
    decoder.dropout.register_forward_hook(lambda _, words, hidden: read.append(hidden / words[0]))
    scheduled_sampling(decoder, torch.randn(3, 4, 6), torch.full((6, 8), 4), [8] * 6, IMAGE_INDEX, 0.5)
    words = [each.view(len(IMAGE_INDEX), 40) for each in read if each.shape[-1] == 40][::2]
    assert len(words) == 8
    assert all(torch.equal(each, words[0]) for each in words)
    assert len({tuple(row.tolist()) for row in words[0]}) == len(IMAGE_INDEX)
