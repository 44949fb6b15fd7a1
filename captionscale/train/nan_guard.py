"""Divergence: a loss or a gradient that is no number ends the run unsaved, and is traced to its images."""

import torch
from torch import Tensor

from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError

_IDS = 8


class NanGuard:
    """Keeps the losses of the steps since the last look, so that no step waits for its device."""

    def __init__(self, ranks: Ranks, precision: str):
        self._ranks = ranks
        # In fp16 an overflowing gradient is the loss scaler's daily work: it leaves that step out.
        self._may_overflow = precision == "fp16"
        self._steps: list[tuple[int, Tensor, Tensor, list[tuple[int, list[int], Tensor]]]] = []

    def record(
        self, step: int, loss: Tensor, norm: Tensor, share: list[tuple[int, Batch]], losses: list[Tensor]
    ) -> None:
        """Keep what a step gave, to be looked at later.

        Args:
            step: From 1.
            loss: Over all ranks.
            norm: Of the gradient.
            share: This rank's micro-batches, by their numbers.
            losses: Of each of them.
        """
        parts = [(number, batch.image_ids, part) for (number, batch), part in zip(share, losses, strict=True)]
        self._steps.append((step, loss, norm, parts))

    def check(self) -> None:
        """Look at the steps kept so far, and forget them; all ranks call it.

        Raises:
            UserError: One of them gave no number.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        figures = torch.stack([torch.stack([loss.double(), norm.double()]) for _, loss, norm, _ in steps])
        losses, norms = figures.isfinite().T.tolist()
        for (step, loss, norm, parts), is_loss, is_norm in zip(steps, losses, norms, strict=True):
            if not is_loss or not (is_norm or self._may_overflow):
                bad = [(number, ids) for number, ids, part in parts if not part.isfinite().item()]
                self._ranks.run_on_main(_tell, step, loss.item(), norm.item(), self._ranks.gather(bad))


def _tell(step: int, loss: float, norm: float, bad: list[tuple[int, list[int]]]) -> None:
    place = ""
    if bad:
        number, ids = min(bad)
        more = f" and {len(ids) - _IDS:,} more" * (len(ids) > _IDS)
        place = f" (first in micro-batch {number}: images {', '.join(map(str, ids[:_IDS]))}{more})"
    raise UserError(
        f"step {step:,}: loss {loss:g}{place}, gradient norm {norm:g}, wanted numbers; lower train.lr, or set"
        " train.precision to bf16 or fp32; what was saved before is whole"
    )
