"""Losses: cross-entropy of weighted captions, and the doubly stochastic attention penalty."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from captionscale.data.loader import input_lengths
from captionscale.model.decoders.decoder import packed_index
from captionscale.model.decoders.recurrence import CACHE_ELEMENTS
from captionscale.vocab import PAD, START, UNK


@dataclass(frozen=True)
class Target:
    """Captions that a step makes more or less likely."""

    images: UInt8[Tensor, "image 3 height width"] | Float[Tensor, "image region feature"]
    tokens: Int[Tensor, "caption time"]
    """Start, words, end, then padding; sampled captions come first, then references."""
    image_index: Int[Tensor, "caption"]
    """Row of `images` for each caption."""
    num_sampled: int = 0
    """Number of sampled captions."""
    advantages: Callable[[], Float[Tensor, "sample"]] | None = None
    """Reward minus baseline of each; called after the forward pass has been queued on the device, so that the
    host computes rewards meanwhile."""
    lengths: Sequence[int] = ()
    """Number of tokens to read of each caption, for the host; by default from `tokens`."""

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.tokens):
            object.__setattr__(self, "lengths", input_lengths(self.tokens))

    @property
    def input_tokens(self) -> Int[Tensor, "caption time"]:
        """Tokens to read; padding where no token follows."""
        return self.tokens[:, :-1].where(self.tokens[:, 1:] != PAD, PAD)

    @property
    def rows(self) -> Int[Tensor, "token"]:
        """Flat positions of the tokens to predict, caption after caption."""
        return packed_index(self.lengths, self.tokens.shape[1] - 1, self.tokens.device)

    @property
    def num_tokens(self) -> Int[Tensor, "2"]:
        """Tokens to predict, in sampled captions and in references."""
        counts = (self.tokens[:, 1:] != PAD).sum(1)
        return torch.stack([counts[: self.num_sampled].sum(), counts[self.num_sampled :].sum()])

    def weights(
        self, num_tokens: Float[Tensor, "2"], cross_entropy_weight: float
    ) -> Float[Tensor, "caption"]:
        """Return the weight of each caption; `num_tokens` are summed over the micro-batches of the step."""
        # On the device: reading them would make the host wait.
        sampled, references = num_tokens.double().clamp(min=1)
        weights: Tensor = (cross_entropy_weight / references).float().repeat(len(self.tokens))
        if self.advantages:
            weights[: self.num_sampled] = self.advantages() * ((1 - cross_entropy_weight) / sampled).float()
        return weights


def mask_unsampleable_tokens(logits: Float[Tensor, "row word"], target: Target) -> Float[Tensor, "row word"]:
    """Return logits of `target.rows`, with PAD, START and UNK masked in sampled captions."""
    if not target.num_sampled:
        return logits
    num_rows = sum(target.lengths[: target.num_sampled])
    masked = torch.tensor([PAD, START, UNK], device=logits.device)
    return torch.cat([logits[:num_rows].index_fill(1, masked, -torch.inf), logits[num_rows:]])


def cross_entropy(
    logits: Float[Tensor, "row word"],
    targets: Int[Tensor, "caption time"],
    label_smoothing: float,
    rows: Int[Tensor, "row"],
) -> Float[Tensor, "caption"]:
    """Return the sum of each caption's negative log-probabilities; the step divides by its number of tokens.

    `rows` are the flat positions of the logits in `targets`, where padding is ignored.

    Source:
        Label smoothing: Szegedy et al. 2016 (arXiv:1512.00567), section 7.
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets.flatten()[rows], label_smoothing)
    return losses.new_zeros(len(targets)).index_add(0, rows // targets.shape[1], losses)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row in fp32; padding is ignored.

    With p = softmax(x) over V words, label y, smoothing s, and d the gradient of the result,

        -(1 - s) log p_y - s / V sum_i log p_i;    dx_i = d (p_i - (1 - s) [i = y] - s / V).

    On a CPU in blocks of rows that stay in the cache; p is recomputed in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "row word"], labels: Int[Tensor, "row"], smoothing: float
    ) -> Float[Tensor, "row"]:
        ctx.save_for_backward(logits, labels)
        ctx.smoothing = smoothing
        options: Any = {"ignore_index": PAD, "reduction": "none", "label_smoothing": smoothing}
        return torch.cat(
            [F.cross_entropy(logits[rows].float(), labels[rows], **options) for rows in _blocks(logits)]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Float[Tensor, "row"]) -> tuple[Tensor, None, None]:
        (logits, labels), smoothing = ctx.saved_tensors, ctx.smoothing
        dlogits, factors = torch.empty_like(logits), dlosses.where(labels != PAD, 0).unsqueeze(1)
        for rows in _blocks(logits):
            probs = logits[rows].softmax(1, torch.float32)
            if smoothing:
                probs -= smoothing / logits.shape[1]
            label = labels[rows].unsqueeze(1)
            probs.scatter_add_(1, label, probs.new_full(label.shape, smoothing - 1))
            torch.mul(probs, factors[rows], out=dlogits[rows])
        return dlogits, None, None


def _blocks(logits: Float[Tensor, "row word"]) -> Iterator[slice]:
    """Yield the rows to compute at a time: at least one block."""
    count = max(1, len(logits))
    size = max(1, CACHE_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else count
    return (slice(start, start + size) for start in range(0, count, size))


def doubly_stochastic_penalty(
    attention: Float[Tensor, "caption time region"], targets: Int[Tensor, "caption time"]
) -> Float[Tensor, "caption"]:
    """Return the penalty of each caption: the sum over regions i of (1 - sum over t of a_ti)^2.

    a_ti is the attention to region i before token t; attention before padding is ignored.

    Source:
        Xu et al. 2015 (arXiv:1502.03044), equation 14: the doubly stochastic penalty.
    """
    total = (attention.float() * (targets != PAD).unsqueeze(2)).sum(1)
    return (1 - total).square().sum(1)
