"""Process of a run's trackers: sends new lines of `log.jsonl` to each of them."""

import json
import os
import select
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

import msgspec

from captionscale import parsing, subprocesses
from captionscale.files import atomic_write, read_file
from captionscale.train.run_folder import LOG_FILE
from captionscale.train.tracking import TRACKERS_FILE, flatten_scalars

_PROJECT, _STEP = "captionscale", "step"
_POLL_S = 1.0
_IDS = msgspec.json.Decoder(dict[str, str])


@runtime_checkable
class _Tracker(Protocol):
    id: str
    """Of the tracker's run, to continue it later."""
    place: str
    """URL or folder, if known."""

    def log(self, step: int, points: Mapping[str, float]) -> None:
        """Add a point to each curve; the step may be earlier than the last one."""

    def finish(self) -> None:
        """Flush and close."""


class _Wandb:
    def __init__(self, run: Path, settings: Mapping[str, Any], known: str | None):
        import wandb

        self.id = known or uuid.uuid4().hex[:8]
        # No console to answer its questions; its system metrics are to be those of training.
        options = {"console": "off", "silent": True, "x_stats_pid": os.getppid()}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=self.id,
            resume="allow",
            dir=str(run),
            settings=options,
            config=None if known else dict(settings),
        )
        # Its own step count cannot go back.
        self._run.define_metric("*", step_metric=_STEP)
        self.place = str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def log(self, step: int, points: Mapping[str, float]) -> None:
        self._run.log({_STEP: step, **points})

    def finish(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run: Path, settings: Mapping[str, Any], known: str | None):
        import mlflow
        from mlflow.utils.validation import MAX_PARAMS_TAGS_PER_BATCH

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        info = mlflow.start_run(run_id=known, run_name=run.name).info
        self.id, self.place = info.run_id, info.artifact_uri
        # Parameters cannot be changed later.
        params = [] if known else list(settings.items())
        for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
            mlflow.log_params(dict(params[start : start + MAX_PARAMS_TAGS_PER_BATCH]))

    def log(self, step: int, points: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(points), step=step)

    def finish(self) -> None:
        self._mlflow.end_run()


_Factory = Callable[[Path, Mapping[str, Any], str | None], _Tracker]
_KINDS: dict[str, _Factory] = {"wandb": _Wandb, "mlflow": _MLflow}


class _Sink:
    """A tracker, and counts of lines sent and lost."""

    def __init__(self, name: str, tracker: _Tracker, run: Path, answers: TextIO):
        self._name, self._tracker, self._run, self._answers = name, tracker, run, answers
        self._lines = self._lost = 0

    def log(self, step: int, points: Mapping[str, float]) -> None:
        self._lines += 1
        try:
            self._tracker.log(step, points)
        # Of the network, a server or a package.
        except Exception as error:
            self._lost += 1
            if self._lost == 1:
                _warn(self._answers, self._run, self._name, f"does not take step {step:,}", error)

    def finish(self) -> None:
        try:
            self._tracker.finish()
        except Exception as error:
            _warn(self._answers, self._run, self._name, "cannot finish", error)
        if self._lost:
            text = f"warning: {self._name}: {self._lost:,} of {self._lines:,} lines are missing"
            print(text, file=self._answers, flush=True)


def _serve() -> None:
    """Open the trackers named in the first line of standard input, and serve them until it ends."""
    answers = subprocesses.serve()
    task = json.loads(sys.stdin.readline())
    run = Path(task["run"])
    opened = [
        _Sink(name, tracker, run, answers)
        for name in task["names"]
        if (tracker := _open(name, run, task["settings"], answers))
    ]
    for step, points in _follow(run / LOG_FILE, task["start"]):
        for sink in opened:
            sink.log(step, points)
    for sink in opened:
        sink.finish()


def _follow(path: Path, start: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and points of each line of a log from a byte on, until standard input ends."""
    with path.open("rb") as file:
        file.seek(start)
        ended = False
        torn = b""
        while True:
            # Lines written before the end are read after it.
            while line := torn + file.readline():
                if not line.endswith(b"\n"):
                    torn = line
                    break
                torn = b""
                values = json.loads(line)
                step = values.pop("step")
                if points := flatten_scalars(values):
                    yield step, points
            if ended:
                return
            ended = bool(select.select([sys.stdin], [], [], _POLL_S)[0])


def _open(name: str, run: Path, settings: Mapping[str, Any], answers: TextIO) -> _Tracker | None:
    try:
        ids = _ids(run)
        tracker = _KINDS[name](run, settings, ids.get(name))
        if tracker.id != ids.get(name):
            with atomic_write(run / TRACKERS_FILE) as file:
                file.write(json.dumps({**ids, name: tracker.id}, indent=1).encode())
    # `wandb` raises SystemExit where it cannot ask for a key.
    except (Exception, SystemExit) as error:
        _warn(answers, run, name, "cannot be reached", error)
        return None
    if tracker.place:
        print(f"{name}: {tracker.place}", file=answers, flush=True)
    return tracker


def _ids(run: Path) -> dict[str, str]:
    """Return the known ids of this run."""
    with suppress(FileNotFoundError, ValueError):
        return parsing.decode(read_file(run / TRACKERS_FILE), _IDS)
    return {}


def _warn(answers: TextIO, run: Path, name: str, what: str, error: BaseException) -> None:
    found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    text = f"warning: {name} {what} ({found}); training continues, and {run / LOG_FILE} has all"
    print(text, file=answers, flush=True)


if __name__ == "__main__":
    _serve()
