"""A loss or gradient that is NaN or infinite ends the run unsaved, with the images that caused it."""

from collections.abc import Sequence

import torch

from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.train.step import StepResult

_IDS = 8


class NanGuard:
    """Checks losses and gradient norms of several steps at a time, so that no step waits for its device."""

    def __init__(self, ranks: Ranks, precision: str):
        self._ranks = ranks
        # In fp16 the loss scaler skips steps whose gradient overflows.
        self._may_overflow = precision == "fp16"
        self._steps: list[tuple[int, StepResult, list[tuple[int, list[int]]]]] = []

    def record(self, step: int, result: StepResult, batches: Sequence[tuple[int, Batch]]) -> None:
        """Keep the results of a step to check later."""
        self._steps.append((step, result, [(number, batch.image_ids) for number, batch in batches]))

    def check(self) -> None:
        """Check the steps kept so far, and drop them; all ranks call it.

        Raises:
            UserError: A loss or gradient is not finite.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        values = [torch.stack([result.loss.double(), result.grad_norm.double()]) for _, result, _ in steps]
        finite = torch.stack(values).isfinite().tolist()
        for (step, result, batches), (is_loss, is_norm) in zip(steps, finite, strict=True):
            if not is_loss or not (is_norm or self._may_overflow):
                pairs = zip(batches, result.losses, strict=True)
                causes = self._ranks.gather([batch for batch, loss in pairs if not loss.isfinite().item()])
                loss, norm = result.loss.item(), result.grad_norm.item()
                self._ranks.run_on_main(_raise, step, loss, norm, causes)


def _raise(step: int, loss: float, norm: float, causes: list[tuple[int, list[int]]]) -> None:
    place = ""
    if causes:
        number, ids = min(causes)
        more = f" and {len(ids) - _IDS:,} more" * (len(ids) > _IDS)
        place = f" (first in micro-batch {number}: images {', '.join(map(str, ids[:_IDS]))}{more})"
    raise UserError(
        f"step {step:,}: loss {loss:g}{place}, gradient norm {norm:g}, expected finite numbers; lower"
        " train.lr, or set train.precision to bf16 or fp32; earlier checkpoints are whole"
    )
