"""Trackers besides TensorBoard: Weights & Biases and MLflow, which never hold a run up and never end it.

One thread does all that has to do with them, since MLflow knows its run only in the thread that began it,
and either may wait for a network for minutes. What a tracker does not take is told of; `log.jsonl` has it.
"""

import json
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import msgspec

from captionscale import credentials, parsing, toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.files import atomic, read_file
from captionscale.progress import say
from captionscale.ranks import Tracker, open_tracker

TRACKERS = "trackers.json"
_IDS = msgspec.json.Decoder(dict[str, str])
_PARTING_S = 15.0
"""A job that is asked to leave has little time."""


def refuse_missing(names: tuple[str, ...]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        UserError: There is such a one.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"train.trackers: '{name}' is not installed, wanted captionscale's extra 'track';"
                " pip install 'captionscale[track]', or leave it out"
            )


@dataclass
class _Taken:
    """What has become of what a tracker was given."""

    tracker: Tracker
    points: int = 0
    lost: int = 0


class Trackers:
    """Where a run's metrics also go. Calls return at once."""

    def __init__(self, run: Path, config: Config):
        """Begin to open them, or to go on where an earlier process of the run has been.

        Args:
            run: The run's folder, which keeps their ids for the processes that go on.
            config: Its settings, which they are told.
        """
        self._run, self._config = run, config
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def log(self, step: int, points: Mapping[str, float]) -> None:
        """Hand over numbers.

        Args:
            step: To which they belong; it may be an earlier one than before, as scores come late.
            points: By the names of their curves.
        """
        self._queue.put((step, dict(points)))

    def close(self) -> None:
        """Let them take what they can in a few seconds."""
        self._queue.put(None)
        self._thread.join(_PARTING_S)
        if self._thread.is_alive():
            say(
                f"warning: trackers: about {self._queue.qsize():,} lines have not reached them after"
                f" {_PARTING_S:g} s; {self._run / 'log.jsonl'} has all"
            )

    def _work(self) -> None:
        opened = {
            name: _Taken(tracker) for name in self._config.train.trackers if (tracker := self._open(name))
        }
        while (item := self._queue.get()) is not None:
            step, points = item
            for name, taken in opened.items():
                try:
                    taken.points += 1
                    taken.tracker.log(step, points)
                # Whatever a network, a server or a package brings.
                except Exception as error:
                    taken.lost += 1
                    if taken.lost == 1:
                        self._warn(name, f"does not take step {step:,}", error)
        for name, taken in opened.items():
            try:
                taken.tracker.finish()
            except Exception as error:
                self._warn(name, "cannot end", error)
            if taken.lost:
                say(f"warning: {name}: {taken.lost:,} of {taken.points:,} lines are not there")

    def _open(self, name: str) -> Tracker | None:
        try:
            ids = self._ids()
            settings = toml.flatten(self._config.model_dump(mode="json", exclude_none=True))
            tracker = open_tracker(name, self._run, settings, ids.get(name))
            if tracker.id != ids.get(name):
                with atomic(self._run / TRACKERS) as file:
                    file.write(json.dumps({**ids, name: tracker.id}, indent=1).encode())
        # `wandb` ends by SystemExit where it may not ask for a key.
        except (Exception, SystemExit) as error:
            self._warn(name, "cannot be reached", error)
            return None
        if tracker.place:
            say(f"{name}: {credentials.strip(tracker.place)}")
        return tracker

    def _ids(self) -> dict[str, str]:
        """Return the trackers' own names of this run, as far as it has been there."""
        with suppress(FileNotFoundError, ValueError):
            return parsing.decode(read_file(self._run / TRACKERS), _IDS)
        return {}

    def _warn(self, name: str, what: str, error: BaseException) -> None:
        found = credentials.strip(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
        say(f"warning: {name} {what} ({found}); training goes on, and {self._run / 'log.jsonl'} has all")
