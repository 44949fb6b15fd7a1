"""Results of checks, none of which can fail, hang or hide the others."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from captionscale.errors import UserError

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
    """A check, and when it is run."""

    name: str
    run: Callable[[Any], Iterable[CheckResult]]
    """Takes the plan."""
    deadline_s: int
    needs_plan: bool = True
    slow: bool = False
    """Left out by `--quick`."""


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


def run_check(check: Check, plan: object, host: str) -> list[CheckResult]:
    """Return the results of a check, run in a thread that is abandoned at its deadline."""
    results: list[CheckResult] = []
    began = time.monotonic()

    def add(result: CheckResult) -> None:
        seconds = round(time.monotonic() - began, 3)
        results.append(replace(result, check=check.name, host=host, seconds=seconds))

    def run() -> None:
        try:
            for result in check.run(plan):
                add(result)
        except UserError as error:
            add(failure_of(error))
        # The other checks run whatever it is.
        except BaseException as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            add(replace(warning(f"could not be checked ({text})", "check it by hand"), measured=False))

    thread = threading.Thread(target=run, name=_THREAD + check.name, daemon=True)
    thread.start()
    thread.join(check.deadline_s)
    if thread.is_alive():
        cure = "check whether this machine is overloaded, or its file system or a device hangs"
        add(replace(warning(f"no answer within {check.deadline_s:g} s", cure), measured=False))
    return results.copy()


def verdict(results: Iterable[CheckResult]) -> State:
    """Return the worst state."""
    return max((result.state for result in results), key=_STATES.index, default="ok")


def exit_process(code: int) -> None:
    """Exit, even if the thread of a check still hangs."""
    if any(thread.name.startswith(_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)
