"""What a doctor says: lines, from checks of which none can fail, hang or hide the others."""

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
"""Of what `--json` prints."""


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at."""

    check: str
    """Its name, the same in all versions."""
    state: State
    found: str
    cure: str = ""
    """What to do about it; nothing where it is ok."""
    measured: bool = True
    """False: this could not be looked at, and `found` says why."""
    host: str = ""
    """Whose line it is."""
    seconds: float = 0.0
    """That the check had taken by then."""


@dataclass(frozen=True)
class Check:
    """A question, and how long it may take."""

    name: str
    run: Callable[[], Iterable[CheckResult]]
    deadline_s: float | int


def ok(found: str) -> CheckResult:
    """Return that something is as it should be."""
    return CheckResult("", "ok", found)


def warning(found: str, cure: str) -> CheckResult:
    """Return that something may cost time or quality."""
    return CheckResult("", "warning", found, cure)


def failure(found: str, cure: str) -> CheckResult:
    """Return that the job would fail."""
    return CheckResult("", "failure", found, cure)


def skipped(why: str) -> CheckResult:
    """Return that something could not be looked at."""
    return CheckResult("", "ok", f"not measured: {why}", measured=False)


def failure_of(error: UserError) -> CheckResult:
    """Return an error that the job would end with."""
    found, separator, cure = str(error).rpartition("; ")
    return failure(found, cure) if separator else failure(cure, "see above")


def run_checks(checks: Iterable[Check], host: str) -> Iterator[CheckResult]:
    """Yield what checks find, one after the other, each in a thread that is left behind at its deadline.

    Args:
        checks: In their order.
        host: Of this machine.
    """
    cure = "look whether this machine is overloaded, or its file system or a device hangs"
    late = replace(warning("", cure), measured=False)
    for check in checks:
        began, over = time.monotonic(), False
        said: queue.Queue[CheckResult | None] = queue.Queue()
        threading.Thread(target=_ask, args=(check, said), name=_THREAD + check.name, daemon=True).start()
        while True:
            left = check.deadline_s - (time.monotonic() - began)
            try:
                line = said.get(timeout=max(0.0, left))
            except queue.Empty:
                line, over = replace(late, found=f"no answer within {check.deadline_s:g} s"), True
            if line is None:
                break
            yield replace(line, check=check.name, host=host, seconds=round(time.monotonic() - began, 3))
            if over:
                break


def _ask(check: Check, said: "queue.Queue[CheckResult | None]") -> None:
    try:
        for line in check.run():
            said.put(line)
    except UserError as error:
        said.put(failure_of(error))
    # Whatever it is, the other checks are to be made.
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        said.put(replace(warning(f"could not be looked at ({text})", "look at it by hand"), measured=False))
    said.put(None)


def verdict(lines: Iterable[CheckResult]) -> State:
    """Return the worst state."""
    return max((line.state for line in lines), key=_STATES.index, default="ok")


def document(lines: list[CheckResult]) -> dict[str, Any]:
    """Return what `--json` prints; `docs/running.md` describes it."""
    return {
        "format": FORMAT,
        "captionscale": __version__,
        "verdict": verdict(lines),
        "results": [asdict(line) for line in lines],
    }


def exit_process(code: int) -> None:
    """End with an exit code, also if a check still hangs in a thread that others wait for at the end."""
    if any(thread.name.startswith(_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)
