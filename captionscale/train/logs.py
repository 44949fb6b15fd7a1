"""What a run leaves to read: `log.jsonl` for programs, TensorBoard for curves."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from captionscale.data.loader import Batch
from captionscale.errors import UserError
from captionscale.files import atomic
from captionscale.ranks import Ranks
from captionscale.train.events import Events
from captionscale.train.layout import LOG
from captionscale.train.tracking import points_of


class Log:
    """The log of a run, continued from the step that a resumed run starts at.

    What the resumed run will do again is taken out: lines of later steps, and scores that do not count yet.
    """

    def __init__(self, run: Path, step: int, judged: int):
        self._path = run / LOG
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= (judged if '"scores"' in line else step)]
        with atomic(self._path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self._board = Events(run / "tensorboard", step + 1)

    def write(self, step: int, **values: Any) -> None:
        """Add a line, and a point to each curve.

        Args:
            step: Steps done.
            values: Numbers make curves; a dictionary of numbers, one for each of its keys.

        Raises:
            UserError: The disk is full: without its log a run could not be resumed as one that never stopped.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}), expected free space for each line of"
                " the log; free the disk, and give the same command again"
            ) from error
        if points := points_of(values):
            self._board.write(step, points)

    def close(self) -> None:
        """Write what is left."""
        self._board.close()


class Rate:
    """Counts images and captions between two readings."""

    def __init__(self) -> None:
        self.restart()

    def count(self, batches: list[Batch]) -> None:
        """Take what a step has read."""
        self._images += sum(len(batch.images) for batch in batches)
        self._captions += sum(len(batch.tokens) for batch in batches)

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Return the pace of all ranks together since the last reading."""
        seconds = time.monotonic() - self._began
        images, captions = (ranks.sum(self._images, self._captions) / seconds).tolist()
        self.restart()
        return {"images_per_s": images, "captions_per_s": captions}

    def restart(self) -> None:
        """Count from now on, leaving out what was done since the last reading."""
        self._began, self._images, self._captions = time.monotonic(), 0, 0


def figures(run: Path, key: str, since: float = 0) -> dict[int, Any]:
    """Return one figure of a run's log by step; the run may be at work, and its last line torn.

    Args:
        run: The run's folder.
        key: As `Log.write` was given it.
        since: A time of `time.time`: nothing is told of a log that was not written after it. A run that goes
            on first takes out what the one before did in vain.
    """
    found: dict[int, Any] = {}
    path = run / LOG
    with suppress(FileNotFoundError, NotADirectoryError):
        if path.stat().st_mtime < since:
            return found
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                values = json.loads(line)
                if key in values:
                    found[values["step"]] = values[key]
    return found


def _step_of(line: str) -> float:
    """Return the step of a line; a torn last line, of a killed run, belongs to no step that was saved."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
