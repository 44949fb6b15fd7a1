"""Divergence: a loss or gradient that is not finite ends the run unsaved, with the images that caused it."""

import torch
from torch import Tensor

from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError

_IDS = 8


class NanGuard:
    """Checks losses and gradient norms of several steps at a time, so that no step waits for its device."""

    def __init__(self, ranks: Ranks, precision: str):
        self._ranks = ranks
        # In fp16 the loss scaler skips steps whose gradient overflows.
        self._may_overflow = precision == "fp16"
        self._steps: list[tuple[int, Tensor, Tensor, list[tuple[int, list[int], Tensor]]]] = []

    def record(
        self, step: int, loss: Tensor, norm: Tensor, batches: list[tuple[int, Batch]], losses: list[Tensor]
    ) -> None:
        """Keep the results of a step to check later."""
        parts = [
            (number, batch.image_ids, part) for (number, batch), part in zip(batches, losses, strict=True)
        ]
        self._steps.append((step, loss, norm, parts))

    def check(self) -> None:
        """Check the steps kept so far, and drop them; all ranks call it.

        Raises:
            UserError: A loss or gradient is not finite.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        figures = torch.stack([torch.stack([loss.double(), norm.double()]) for _, loss, norm, _ in steps])
        losses, norms = figures.isfinite().T.tolist()
        for (step, loss, norm, parts), is_loss, is_norm in zip(steps, losses, norms, strict=True):
            if not is_loss or not (is_norm or self._may_overflow):
                bad = [(number, ids) for number, ids, part in parts if not part.isfinite().item()]
                self._ranks.run_on_main(_raise, step, loss.item(), norm.item(), self._ranks.gather(bad))


def _raise(step: int, loss: float, norm: float, bad: list[tuple[int, list[int]]]) -> None:
    place = ""
    if bad:
        number, ids = min(bad)
        more = f" and {len(ids) - _IDS:,} more" * (len(ids) > _IDS)
        place = f" (first in micro-batch {number}: images {', '.join(map(str, ids[:_IDS]))}{more})"
    raise UserError(
        f"step {step:,}: loss {loss:g}{place}, gradient norm {norm:g}, expected finite numbers; lower"
        " train.lr, or set train.precision to bf16 or fp32; earlier checkpoints are whole"
    )
