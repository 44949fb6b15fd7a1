"""Logs of a run: `log.jsonl`, and TensorBoard."""

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
    """Writes a run's log; a resumed run first removes lines that it will write again.

    Damaged lines are moved to `log.jsonl.damaged`, with a warning.
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
        """Add a line; numbers, and dictionaries of numbers, become points of TensorBoard curves.

        Raises:
            UserError: The disk is full; a resume needs a complete log.
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
        """Flush and close."""
        self._board.close()


class Throughput:
    """Images and captions per second."""

    def __init__(self) -> None:
        self.reset()

    def update(self, batches: list[Batch]) -> None:
        """Add the micro-batches of a step."""
        self._images += sum(len(batch.images) for batch in batches)
        self._captions += sum(len(batch.tokens) for batch in batches)

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """Return the throughput of all ranks since the last call."""
        seconds = time.monotonic() - self._began
        images, captions = (ranks.sum(self._images, self._captions) / seconds).tolist()
        self.reset()
        return {"images_per_s": images, "captions_per_s": captions}

    def reset(self) -> None:
        """Restart the count."""
        self._began, self._images, self._captions = time.monotonic(), 0, 0
