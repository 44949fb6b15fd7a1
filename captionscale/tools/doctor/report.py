"""Results of checks, none of which can fail, hang or hide the others."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from captionscale.errors import UserError
from captionscale.version import __version__

State = Literal["ok", "warning", "failure"]
_STATES: tuple[State, ...] = ("ok", "warning", "failure")

_THREAD = "doctor-"

FORMAT = 1
"""Of the JSON document."""


@dataclass(frozen=True)
class CheckResult:
    """One result of a check."""

    check: str
    """Its name, the same in all versions."""
    state: State
    found: str
    cure: str = ""
    """What to do about it; empty if it is ok."""
    measured: bool = True
    """False: it could not be measured, and `found` says why."""
    host: str = ""
    seconds: float = 0.0
    """Since the check began."""


@dataclass(frozen=True)
class Check:
    """A check, and its deadline."""

    name: str
    run: Callable[[], Iterable[CheckResult]]
    deadline_s: float | int


def ok(found: str) -> CheckResult:
    """Return a passed check."""
    return CheckResult("", "ok", found)


def warning(found: str, cure: str) -> CheckResult:
    """Return what may cost time or quality."""
    return CheckResult("", "warning", found, cure)


def failure(found: str, cure: str) -> CheckResult:
    """Return what would make the job fail."""
    return CheckResult("", "failure", found, cure)


def skipped(why: str) -> CheckResult:
    """Return what could not be measured."""
    return CheckResult("", "ok", f"not measured: {why}", measured=False)


def failure_of(error: UserError) -> CheckResult:
    """Return an error with which the job would end."""
    found, separator, cure = str(error).rpartition("; ")
    return failure(found, cure) if separator else failure(cure, "see above")


def run_checks(checks: Iterable[Check], host: str) -> Iterator[CheckResult]:
    """Yield the results of checks, each run in a thread that is abandoned at its deadline.

    Args:
        checks: Run one after the other.
        host: Name of this machine.
    """
    cure = "check whether this machine is overloaded, or its file system or a device hangs"
    late = replace(warning("", cure), measured=False)
    for check in checks:
        began, over = time.monotonic(), False
        results: queue.Queue[CheckResult | None] = queue.Queue()
        threading.Thread(target=_ask, args=(check, results), name=_THREAD + check.name, daemon=True).start()
        while True:
            left = check.deadline_s - (time.monotonic() - began)
            try:
                line = results.get(timeout=max(0.0, left))
            except queue.Empty:
                line, over = replace(late, found=f"no answer within {check.deadline_s:g} s"), True
            if line is None:
                break
            yield replace(line, check=check.name, host=host, seconds=round(time.monotonic() - began, 3))
            if over:
                break


def _ask(check: Check, results: "queue.Queue[CheckResult | None]") -> None:
    try:
        for line in check.run():
            results.put(line)
    except UserError as error:
        results.put(failure_of(error))
    # Whatever it is, the other checks run.
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        results.put(replace(warning(f"could not be checked ({text})", "check it by hand"), measured=False))
    results.put(None)


def verdict(lines: Iterable[CheckResult]) -> State:
    """Return the worst state."""
    return max((line.state for line in lines), key=_STATES.index, default="ok")


def document(lines: list[CheckResult]) -> dict[str, Any]:
    """Return the JSON document that `docs/running.md` describes."""
    return {
        "format": FORMAT,
        "captionscale": __version__,
        "verdict": verdict(lines),
        "results": [asdict(line) for line in lines],
    }


def exit_process(code: int) -> None:
    """Exit, even if the thread of a check still hangs."""
    if any(thread.name.startswith(_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)
