"""An encoder for SLURM jobs that are interrupted: no run must last long enough to be."""

import os
import signal
import time
from typing import Any

import tiny_encoder
from torch import Tensor

from captionscale.train import preemption

_BATCHES = 8
"""Micro-batches of training before the interruption: more than a step's, so that a checkpoint is saved."""


class InterruptedEncoder(tiny_encoder.TinyEncoder):
    """Waits for a signal, or has rank 1 killed, after some batches of training.

    The variable INTERRUPTIONS has a word for each start of the job: `signal` or `kill`; then nothing happens.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._batches = 0

    def forward(self, images: Tensor) -> Tensor:
        # `doctor` computes with it too, and handles no signals.
        if self.training and signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL:
            self._batches += 1
            if self._batches == _BATCHES:
                self._interrupt()
        return super().forward(images)

    def _interrupt(self) -> None:
        words = dict(enumerate(os.environ.get("INTERRUPTIONS", "").split()))
        match words.get(int(os.environ.get("SLURM_RESTART_COUNT", "0"))):
            case "signal":
                while not preemption.requested():
                    time.sleep(0.05)
            case "kill" if os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGKILL)
