"""Reads `log.jsonl`, which may be growing, torn or damaged; imports no torch."""

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
    """Keys that readers rely on; a line may have more."""

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
    """Metrics logged by a run; a missing log is empty."""

    def __init__(self, run: Path):
        """Read the current log.

        Raises:
            UserError: It cannot be read.
        """
        self.path = run / LOG_FILE
        self.lines = read_json_lines(self.path, parse_line)

    def metric(self, key: str) -> dict[int, float]:
        """Return the finite values of a metric by step."""
        return {line["step"]: line[key] for _, line in self.lines.valid if _is_finite(line.get(key))}

    @property
    def scores(self) -> dict[int, dict[str, float]]:
        """Scores of the validation split by step."""
        return {line["step"]: line["scores"] for _, line in self.lines.valid if line.get("scores")}

    @property
    def warning(self) -> str:
        """One line about skipped lines; empty if there are none."""
        return self.lines.warning(self.path)


@dataclass
class JsonLinesReader(Generic[T]):
    """Reads new lines of a growing file of JSON lines, or all if it was rewritten."""

    path: Path
    parse: Callable[[bytes], T]
    """Reads a line; raises ValueError for a damaged one."""
    lines: list[T] = field(default_factory=list)
    damaged: int = 0
    """Number of skipped lines."""
    _inode: int = 0
    _offset: int = 0

    def read(self) -> None:
        """Read new lines; a torn last line is left for the next call, damaged ones are counted."""
        try:
            # Opened each time, to see another machine's changes over NFS.
            with open_file(self.path) as file:
                facts = os.fstat(file.fileno())
                # A resumed run rewrites the log, without the steps it will repeat.
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


def read_json_lines(path: Path, parse: Callable[[bytes], T]) -> Lines[T]:
    """Return the lines of a file that training wrote; none if it is missing.

    Raises:
        UserError: It cannot be read.
    """
    try:
        data = read_file(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        data = b""
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), expected a file that training wrote; correct its"
            " permissions, or move it away"
        ) from None
    return parsing.read_lines(data, parse)


def parse_line(line: bytes) -> dict[str, Any]:
    """Return a line of a log without values that are NaN or infinite.

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
    """Return a metric by step; a log not written `since` a time of `time.time` counts as empty.

    A resumed run first removes the steps that it will repeat.

    Raises:
        UserError: The log cannot be read.
    """
    with suppress(OSError):
        if (run / LOG_FILE).stat().st_mtime >= since:
            return RunLog(run).metric(key)
    return {}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
