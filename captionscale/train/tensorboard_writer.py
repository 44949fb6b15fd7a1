"""TensorBoard event files, written without a thread: a full disk delays points but never ends a run."""

import io
import itertools
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from captionscale.progress import say

_numbers = itertools.count()


class EventWriter:
    """One event file."""

    def __init__(self, folder: Path, step: int):
        """Begin a file; TensorBoard hides points of earlier files from this step on."""
        place = f"{os.uname().nodename}.{os.getpid()}.{next(_numbers)}"
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{place}"
        self._size, self._warned = 0, False
        self._waiting = bytearray()
        """Records not yet in the file."""
        self._append(Event(step=step, file_version="brain.Event:2"))
        self._append(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, points: Mapping[str, float]) -> None:
        """Add a point to each curve by name; points that the disk refuses are written later."""
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in points.items()]
        self._append(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Flush, and warn if points are missing."""
        self._flush()
        if self._waiting:
            say(f"warning: {self._path}: the last points are missing; log.jsonl has all")

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._waiting += record.getvalue()
        self._flush()

    def _flush(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(self._waiting)
        except OSError as error:
            # Readers stop at a torn record.
            with suppress(OSError):
                os.truncate(self._path, self._size)
            if not self._warned:
                self._warned = True
                say(
                    f"warning: {self._path}: cannot be written ({error.strerror}); points are missing in"
                    " TensorBoard until there is space; training continues, log.jsonl has all; free the disk"
                )
        else:
            self._size += len(self._waiting)
            self._waiting.clear()
