"""Weights & Biases and MLflow; they never delay or end a run.

They run in a process of their own, which reads `log.jsonl`: either package may wait minutes for a network, in
threads and exit hooks, and may start processes, all of which can be killed.
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
_CLOSE_S = 15.0
"""A job that was asked to stop has little time."""


def check_trackers_installed(names: tuple[str, ...]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        UserError: One is missing.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"train.trackers: '{name}' is not installed, expected captionscale's extra 'track';"
                " pip install 'captionscale[track]', or leave it out"
            )


def flatten_scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a log line by names such as `scores/CIDEr-D`."""
    return {
        f"{key}/{name}" if name else key: number
        for key, value in values.items()
        for name, number in (value if isinstance(value, dict) else {"": value}).items()
        if isinstance(number, int | float)
    }


class Trackers:
    """Sends the numbers of new lines of `log.jsonl` to the trackers."""

    def __init__(self, run: Path, config: Config):
        """Start the process; a resumed run continues its earlier tracker runs."""
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
            process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._warn(f"have not taken all within {_CLOSE_S:g} s and are ended")
            subprocesses.kill_tree(process)
        # Its last messages.
        self._thread.join(1)

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as messages:
            for line in messages:
                say(credentials.strip(line.rstrip("\n")))
        code = process.wait()
        if code and not self._closing:
            self._warn(f"their process ended with exit code {code}")

    def _warn(self, what: str) -> None:
        say(f"warning: trackers: {what}; {self._log} has all")
