"""Trackers next to TensorBoard: Weights & Biases and MLflow, which never hold a run up and never end it.

They run in a process of their own, which reads what `log.jsonl` gets. Either package may wait for a network
for minutes, in threads and in hooks at Python's exit, and may start processes: all of that can be ended.
"""

import json
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from captionscale import credentials, subprocesses, toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.progress import say
from captionscale.train.run_folder import LOG_FILE

TRACKERS_FILE = "trackers.json"
_PARTING_S = 15.0
"""A job that is asked to leave has little time."""


def check_trackers_installed(names: tuple[str, ...]) -> None:
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


def flatten_scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among a log line's values by the names of their curves, such as `scores/CIDEr-D`."""
    return {
        f"{key}/{name}" if name else key: number
        for key, value in values.items()
        for name, number in (value if isinstance(value, dict) else {"": value}).items()
        if isinstance(number, int | float)
    }


class Trackers:
    """Where a run's metrics also go: each number of `log.jsonl` from now on, at its step."""

    def __init__(self, run: Path, config: Config):
        """Begin to open them, or to continue where an earlier process of the run has been.

        Args:
            run: The run's folder, whose log is open; it keeps their ids for when the run is resumed.
            config: Its settings, which they are told.
        """
        self._log, self._closing = run / LOG_FILE, False
        self._process: subprocess.Popen[str] | None = None
        task = {
            "run": str(run),
            "names": config.train.trackers,
            "settings": toml.flatten(config.model_dump(mode="json", exclude_none=True)),
            "start": self._log.stat().st_size,
        }
        try:
            process = subprocesses.start_module(
                "captionscale.train.tracker_process", stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        except OSError as error:
            self._warn(f"their process does not start ({error})")
            return
        self._process = process
        self._thread = threading.Thread(target=self._listen, args=(process,), name="trackers", daemon=True)
        self._thread.start()
        with suppress(BrokenPipeError):
            print(json.dumps(task), file=process.stdin, flush=True)

    def close(self) -> None:
        """Let them take what they can in a few seconds, and end their process with all that it started."""
        process, self._closing = self._process, True
        if process is None:
            return
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_PARTING_S)
        except subprocess.TimeoutExpired:
            self._warn(f"have not taken all within {_PARTING_S:g} s and are ended")
            subprocesses.kill_tree(process)
        # What it said last.
        self._thread.join(1)

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as answers:
            for line in answers:
                say(credentials.strip(line.rstrip("\n")))
        code = process.wait()
        if code and not self._closing:
            self._warn(f"their process ended with exit code {code}")

    def _warn(self, what: str) -> None:
        say(f"warning: trackers: {what}; {self._log} has all")
