"""What training minimises: the negative log-probability of captions, each with a weight of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from captionscale.model.decoders.recurrence import CACHE_ELEMENTS
from captionscale.vocab import PAD, START, UNK


@dataclass(frozen=True)
class Target:
    """Captions that a step makes likelier, or less likely."""

    images: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"]
    tokens: Int[Tensor, "caption time"]
    """Start, words, end, then padding; the captions that the decoder sampled come first, then people's."""
    image_index: Int[Tensor, "caption"]
    """The row of `images` that each caption belongs to."""
    num_sampled: int = 0
    """How many of the captions are the decoder's."""
    advantages: Callable[[], Float[Tensor, "sample"]] | None = None
    """By how much the reward of each of these is above what was to be expected; asked for only when the
    decoder's forward pass has been handed to the device, so that both are worked out at a time."""

    @property
    def input_tokens(self) -> Int[Tensor, "caption time"]:
        """What each time reads; nothing where nothing follows, as after the end."""
        return self.tokens[:, :-1].where(self.tokens[:, 1:] != PAD, PAD)

    @property
    def rows(self) -> Int[Tensor, "row"] | None:
        """Where words are to follow, counted caption after caption.

        None on a GPU: to know how many there are, the host would wait for the device.
        """
        if self.tokens.device.type != "cpu":
            return None
        return (self.tokens[:, 1:] != PAD).flatten().nonzero().squeeze(1)

    @property
    def num_tokens(self) -> Int[Tensor, "2"]:
        """Words to predict, in the decoder's captions and in people's: all but padding and the starts."""
        words = (self.tokens[:, 1:] != PAD).sum(1)
        return torch.stack([words[: self.num_sampled].sum(), words[self.num_sampled :].sum()])

    def weights(
        self, num_tokens: Float[Tensor, "2"], cross_entropy_weight: float
    ) -> Float[Tensor, "caption"]:
        """Return what each caption counts in the step's loss.

        Args:
            num_tokens: As the property, over all ranks: a word weighs the same wherever it is read.
            cross_entropy_weight: Share of the loss that is people's captions.
        """
        # They stay on the device: a host that read them would wait for all that it was handed before.
        sampled, people = num_tokens.double().clamp(min=1)
        weights: Tensor = (cross_entropy_weight / people).float().repeat(len(self.tokens))
        if self.advantages:
            weights[: self.num_sampled] = self.advantages() * ((1 - cross_entropy_weight) / sampled).float()
        return weights


def mask_unsampleable_tokens(
    logits: Float[Tensor, "*batch word"], target: Target, rows: Int[Tensor, "row"] | None
) -> Float[Tensor, "*batch word"]:
    """Return logits in which sampled captions have no chance to say what sampling never says.

    Without it their probability would be another than the one that they were drawn with.

    Args:
        logits: Of the words that follow in the target's captions.
        target: Tells which captions were sampled.
        rows: Of the words that the logits are of, counted caption after caption; without them, all.
    """
    if not target.num_sampled:
        return logits
    first = target.num_sampled * (target.tokens.shape[1] - 1)
    words = first if rows is None else int((rows < first).sum())
    flat, never = logits.flatten(0, -2), torch.tensor([PAD, START, UNK], device=logits.device)
    sampled = flat[:words].index_fill(1, never, -torch.inf)
    return torch.cat([sampled, flat[words:]]).view_as(logits)


def cross_entropy(
    logits: Float[Tensor, "caption time word"] | Float[Tensor, "row word"],
    targets: Int[Tensor, "caption time"],
    label_smoothing: float,
    rows: Int[Tensor, "row"] | None = None,
) -> Float[Tensor, "caption"]:
    """Return of each caption the sum over its words of their negative log-probability.

    A sum, not a mean: the step divides by its number of words over all ranks.

    Args:
        logits: Of the word that follows each time.
        targets: That word; padding counts nothing.
        label_smoothing: Share of the target that goes to all words alike.
        rows: Of the words that the logits are of, counted caption after caption; without them, all.

    Source:
        Label smoothing: Szegedy et al. 2016 (arXiv:1512.00567), section 7.
    """
    wanted = targets.flatten() if rows is None else targets.flatten()[rows]
    words: Tensor = _CrossEntropy.apply(logits.flatten(0, -2), wanted, label_smoothing)
    if rows is None:
        return words.view_as(targets).sum(1)
    return words.new_zeros(len(targets)).index_add(0, rows // targets.shape[1], words)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row, in single precision; padding counts nothing.

    With p = softmax(x) of V words, y the wanted one, s the smoothing and d the gradient of the result,

        -(1 - s) log p_y - s / V sum_i log p_i;    dx_i = d (p_i - (1 - s) [i = y] - s / V).

    On a CPU a few rows at a time, which stay in the cache; p is computed anew on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "row word"], wanted: Int[Tensor, "row"], smoothing: float
    ) -> Float[Tensor, "row"]:
        """Return the negative log-probability of each wanted word."""
        ctx.save_for_backward(logits, wanted)
        ctx.smoothing = smoothing
        losses = [
            F.cross_entropy(
                logits[rows].float(),
                wanted[rows],
                ignore_index=PAD,
                reduction="none",
                label_smoothing=smoothing,
            )
            for rows in _blocks(logits)
        ]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Float[Tensor, "row"]) -> tuple[Tensor, None, None]:
        """Return the gradient of the logits."""
        (logits, wanted), smoothing = ctx.saved_tensors, ctx.smoothing
        dlogits, factors = torch.empty_like(logits), dlosses.where(wanted != PAD, 0).unsqueeze(1)
        for rows in _blocks(logits):
            chances = logits[rows].softmax(1, torch.float32)
            if smoothing:
                chances -= smoothing / logits.shape[1]
            hit = wanted[rows].unsqueeze(1)
            chances.scatter_add_(1, hit, chances.new_full(hit.shape, smoothing - 1))
            torch.mul(chances, factors[rows], out=dlogits[rows])
        return dlogits, None, None


def _blocks(logits: Float[Tensor, "row word"]) -> Iterator[slice]:
    """Yield the rows that are worked at a time."""
    some = max(1, CACHE_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return (slice(start, start + some) for start in range(0, max(1, len(logits)), some))


def doubly_stochastic_penalty(
    attention: Float[Tensor, "caption time region"], targets: Int[Tensor, "caption time"]
) -> Float[Tensor, "caption"]:
    """Return of each caption by how much it looked at some regions more than at others.

    With a_ti the attention to region i before word t: the sum over i of (1 - sum over t of a_ti)^2.

    Args:
        attention: Non-negative, summing to one over the regions.
        targets: The words that were to follow; what was looked at before padding counts nothing.

    Source:
        Xu et al. 2015 (arXiv:1502.03044), equation 14: the doubly stochastic penalty.
    """
    looked = (attention.float() * (targets != PAD).unsqueeze(2)).sum(1)
    return (1 - looked).square().sum(1)
