"""What the ranks tell each other of being asked to leave."""

import torch
from torch import Tensor


class PreemptionFlag:
    """Whether a rank was asked to leave when the last step began: all ranks read the same.

    It came with the number of words, and is read a step later, so that no rank waits for its device.
    """

    def __init__(self) -> None:
        self._asked: Tensor | None = None
        self._here: torch.cuda.Event | None = None

    def update(self, asked: Tensor) -> None:
        """Take how many were asked, summed over all ranks."""
        self._asked = asked.to("cpu", non_blocking=True)
        if asked.is_cuda:
            self._here = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._here.record()

    def is_set(self) -> bool:
        """Return whether any was."""
        if self._here is not None:
            self._here.synchronize()
        return self._asked is not None and bool(self._asked)
