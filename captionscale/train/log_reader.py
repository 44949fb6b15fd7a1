"""Reads `log.jsonl`, which may be at work, torn or damaged; who reads it needs no torch."""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import MB, open_file, read_file
from captionscale.parsing import Lines
from captionscale.train.run_folder import LOG_FILE
from captionscale.train.state import Step

_MAX_BYTES = 512 * MB

T = TypeVar("T")


class _Line(msgspec.Struct):
    """What readers rely on; a line may hold more."""

    step: Step
    scores: dict[str, float] = {}
    epoch: float | None = None
    loss: float | None = None
    lr: float | None = None
    reward: float | None = None
    dangling: float | None = None
    distinct: float | None = None
    grad_norm: float | None = None
    images_per_s: float | None = None
    captions_per_s: float | None = None
    save_s: float | None = None
    save_wait_s: float | None = None
    stop_reason: str = ""


class RunLog:
    """The figures of a run."""

    def __init__(self, run: Path):
        """Read the log as it is now; no log is an empty one.

        Raises:
            UserError: It cannot be read.
        """
        self.path = run / LOG_FILE
        self.lines = read(self.path)

    def metric(self, key: str) -> dict[int, float]:
        """Return the finite figures of one name by step."""
        return {line["step"]: line[key] for _, line in self.lines.valid if _is_finite(line.get(key))}

    @property
    def scores(self) -> dict[int, dict[str, float]]:
        """Scores of the validation split by step."""
        return {line["step"]: line["scores"] for _, line in self.lines.valid if line.get("scores")}

    @property
    def warning(self) -> str:
        """One line that names the lines that were passed over; nothing if there are none."""
        return self.lines.warning(self.path)


@dataclass
class JsonLinesReader(Generic[T]):
    """Reads a file of JSON lines again and again: only what is new, or all, if it was written anew."""

    path: Path
    parse: Callable[[bytes], T]
    """Reads a line; raises ValueError for a damaged one."""
    lines: list[T] = field(default_factory=list)
    damaged: int = 0
    """Lines that were passed over."""
    _inode: int = 0
    _offset: int = 0

    def read(self) -> None:
        """Take in what has come. A torn last line is left for the next time; damaged ones are counted."""
        try:
            # Opened each time: over NFS that is what brings in another machine's changes.
            with open_file(self.path) as file:
                facts = os.fstat(file.fileno())
                # A run that goes on writes the log anew, without what it will do again.
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._forget(facts.st_ino)
                file.seek(self._offset)
                data = file.read(min(facts.st_size - self._offset, _MAX_BYTES))
        except FileNotFoundError:
            self._forget()
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = parsing.read_lines(whole, self.parse)
        self.lines += [line for _, line in found.valid]
        self.damaged += len(found.damaged)

    def _forget(self, inode: int = 0) -> None:
        self.lines, self.damaged, self._offset, self._inode = [], 0, 0, inode


def read(path: Path) -> Lines[dict[str, Any]]:
    """Return the lines of a log; none if there is no log.

    Raises:
        UserError: It cannot be read.
    """
    try:
        data = read_file(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        data = b""
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), expected the log of a run; correct its rights, or"
            " move it away"
        ) from None
    return parsing.read_lines(data, parse_line)


def parse_line(line: bytes) -> dict[str, Any]:
    """Return a line of a log without figures that are no numbers (NaN, Infinity).

    Raises:
        ValueError: It is not one.
    """
    tree = parsing.loads(line)
    try:
        known = msgspec.convert(tree, _Line)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ValueError(str(error)) from None
    figures = {key: value for key, value in tree.items() if not isinstance(value, float) or _is_finite(value)}
    if known.scores:
        figures["scores"] = {name: value for name, value in known.scores.items() if _is_finite(value)}
    return figures


def read_metric(run: Path, key: str, since: float = 0) -> dict[int, float]:
    """Return one figure of a run's log by step; the run may be at work.

    Args:
        run: The run's folder.
        key: As `LogWriter.write` was given it.
        since: A time of `time.time`: nothing is told of a log that was not written after it. A run that goes
            on first takes out what the one before did in vain.

    Raises:
        UserError: The log cannot be read.
    """
    with suppress(OSError):
        if (run / LOG_FILE).stat().st_mtime >= since:
            return RunLog(run).metric(key)
    return {}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
