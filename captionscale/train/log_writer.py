"""What a run leaves to read: `log.jsonl` for programs, TensorBoard for curves."""

import json
import time
from pathlib import Path
from typing import Any

from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.files import append_lines, atomic_write
from captionscale.progress import say
from captionscale.train.log_reader import RunLog
from captionscale.train.run_folder import LOG_FILE
from captionscale.train.tensorboard_writer import EventWriter
from captionscale.train.tracking import flatten_scalars


class LogWriter:
    """The log of a run, continued from the step that a resumed run starts at.

    What the resumed run will do again is taken out: lines of later steps, and scores that do not count yet.
    Damaged lines are moved to `log.jsonl.damaged`, and named.
    """

    def __init__(self, run: Path, step: int, scored_step: int):
        self._path = run / LOG_FILE
        found = RunLog(run)
        if found.warning:
            copy = self._path.with_name(LOG_FILE + ".damaged")
            append_lines(copy, *(line for _, line in found.lines.damaged))
            say(f"warning: {found.warning}; moved to {copy}")
        kept = [
            raw
            for raw, line in found.lines.valid
            if line["step"] <= (scored_step if "scores" in line else step)
        ]
        with atomic_write(self._path) as file:
            file.writelines(raw + b"\n" for raw in kept)
        self._board = EventWriter(run / "tensorboard", step + 1)

    def write(self, step: int, **values: Any) -> None:
        """Add a line, and a point to each curve.

        Args:
            step: Steps done.
            values: Numbers make curves; a dictionary of numbers, one for each of its keys.

        Raises:
            UserError: The disk is full: without its log a run could not be resumed as one that never stopped.
        """
        try:
            append_lines(self._path, json.dumps({"step": step, **values}).encode())
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}), expected free space for each line of"
                " the log; free the disk, and give the same command again"
            ) from error
        if points := flatten_scalars(values):
            self._board.write(step, points)

    def close(self) -> None:
        """Write what is left."""
        self._board.close()


class Throughput:
    """Counts images and captions between two readings."""

    def __init__(self) -> None:
        self.reset()

    def update(self, batches: list[Batch]) -> None:
        """Take what a step has read."""
        self._images += sum(len(batch.images) for batch in batches)
        self._captions += sum(len(batch.tokens) for batch in batches)

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """Return the pace of all ranks together since the last reading."""
        seconds = time.monotonic() - self._began
        images, captions = (ranks.sum(self._images, self._captions) / seconds).tolist()
        self.reset()
        return {"images_per_s": images, "captions_per_s": captions}

    def reset(self) -> None:
        """Count from now on, leaving out what was done since the last reading."""
        self._began, self._images, self._captions = time.monotonic(), 0, 0
