"""Preemption: a signal, or the end of the SLURM job's time, asks a run to save and exit.

Signal handlers only set a flag; loops check it, and all ranks agree before any of them exits. A preempted run
exits with `PreemptedError.EXIT_CODE`, on which the batch scripts in `slurm/` requeue the job.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from captionscale.errors import PreemptedError, UserError

TIME_LIMIT = "end of the job's time"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_ANNOUNCED_S = 180.0
"""slurm/*.sbatch ask for SIGUSR1 120 s before the end; SLURM may be a minute early."""


@dataclass
class _State:
    exit_at: float = float("inf")
    """Seconds since the epoch."""
    reason: str = ""
    interrupted: bool = False
    """By a first Ctrl-C."""
    requested_at: float = 0.0
    """On the monotonic clock."""
    message: str | None = None


_state = _State()


@contextmanager
def handle_signals(grace_s: float = 10.0) -> Iterator[None]:
    """Handle SIGUSR1, SIGTERM, a first Ctrl-C, and `grace_s` seconds before the end of the job's time.

    Raises:
        UserError: The job has no more than `grace_s` left.
        PreemptedError: The run was preempted (`mark_preempted`).
    """
    global _state
    _state = _State(exit_at=job_end_time() - grace_s)
    if (left := _state.exit_at - time.time()) <= 0:
        raise UserError(
            f"SLURM_JOB_END_TIME: {left + grace_s:,.0f} s left in this job, expected more than the"
            f" {grace_s:g} s in which it saves; ask for more --time, or lower train.grace_s"
        )
    handlers = [signal.signal(number, _handle) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        message, _state = _state.message, _State()
    if message is not None:
        raise PreemptedError(message)


def requested() -> bool:
    """Return whether this process was asked to stop."""
    if time.time() >= _state.exit_at:
        _request(TIME_LIMIT)
    return bool(_state.reason)


def last_request() -> tuple[float, str]:
    """Return the seconds since this process was asked to stop, and the reason; 0 and '' if it was not."""
    return (time.monotonic() - _state.requested_at, _state.reason) if requested() else (0.0, "")


def mark_preempted(message: str) -> None:
    """Have `handle_signals` raise `PreemptedError` with a message, empty on ranks other than 0."""
    _state.message = message


class PreemptionFlag:
    """Whether any rank was asked to stop before the last step; the same on all ranks.

    It is summed with the number of tokens and read one step later, so that no rank waits for its device.
    """

    def __init__(self) -> None:
        self._requests: Any = None
        self._copied: Any = None

    def update(self, requests: Any) -> None:
        """Set it to the number of requests, a tensor summed over all ranks."""
        self._requests = requests.to("cpu", non_blocking=True)
        if requests.is_cuda:
            # This module is imported before torch, which takes seconds.
            import torch

            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def is_set(self) -> bool:
        """Return whether any rank was asked."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._requests is not None and bool(self._requests)


def _handle(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
        if _state.interrupted:
            raise KeyboardInterrupt
        _state.interrupted = True
    announced = number == signal.SIGUSR1 and time.time() >= job_end_time() - _ANNOUNCED_S
    _request(TIME_LIMIT if announced else signal.Signals(number).name)


def _request(reason: str) -> None:
    """Record the first request."""
    if not _state.reason:
        _state.reason, _state.requested_at = reason, time.monotonic()


def job_end_time() -> float:
    """Return when the SLURM job ends, in seconds since the epoch; infinity: no job, or no limit."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() and int(text) else float("inf")
