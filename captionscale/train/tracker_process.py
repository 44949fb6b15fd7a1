"""Process of a run's trackers: sends new lines of `log.jsonl` to each of them."""

import json
import os
import select
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from captionscale import parsing, subprocesses
from captionscale.files import atomic_write, read_file
from captionscale.train.run_folder import LOG_FILE
from captionscale.train.tracking import TRACKERS_FILE, flatten_scalars

_PROJECT = "captionscale"
_POLL_S = 1.0
_IDS = msgspec.json.Decoder(dict[str, str])


class _Wandb:
    def __init__(self, run: Path, settings: Mapping[str, Any], known: str | None):
        import wandb

        self.id = known or uuid.uuid4().hex[:8]
        # No console for its questions; its system metrics are those of training.
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
        self._run.define_metric("*", step_metric="step")
        self.place = str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def log(self, step: int, points: Mapping[str, float]) -> None:
        self._run.log({"step": step, **points})

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


# Each has an id, to continue its run later, and a place: a URL or folder. Steps may be out of order.
_TRACKERS: dict[str, type[_Wandb | _MLflow]] = {"wandb": _Wandb, "mlflow": _MLflow}


def _serve() -> None:
    """Open the trackers named in the first line of standard input, and serve them until it ends."""
    output = subprocesses.serve()
    task = json.loads(sys.stdin.readline())
    run = Path(task["run"])

    def say(text: str) -> None:
        print(text, file=output, flush=True)

    def warn(what: str, error: BaseException) -> None:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        say(f"warning: {what} ({found}); training continues, and {run / LOG_FILE} has all")

    trackers: dict[str, _Wandb | _MLflow] = {}
    num_lines, lost = 0, Counter[str]()
    for name in dict.fromkeys(task["names"]):
        try:
            trackers[name] = tracker = _open(name, run, task["settings"])
        # `wandb` raises SystemExit where it cannot ask for a key.
        except (Exception, SystemExit) as error:
            warn(f"{name} cannot be reached", error)
        else:
            if tracker.place:
                say(f"{name}: {tracker.place}")
    for step, points in _follow(run / LOG_FILE, task["start"]):
        num_lines += 1
        for name, tracker in trackers.items():
            try:
                tracker.log(step, points)
            # Of the network, a server or a package.
            except Exception as error:
                lost[name] += 1
                if lost[name] == 1:
                    warn(f"{name} does not take step {step:,}", error)
    for name, tracker in trackers.items():
        try:
            tracker.finish()
        except Exception as error:
            warn(f"{name} cannot finish", error)
        if lost[name]:
            say(f"warning: {name}: {lost[name]:,} of {num_lines:,} lines are missing")


def _open(name: str, run: Path, settings: Mapping[str, Any]) -> _Wandb | _MLflow:
    """Continue a tracker's run, or start one."""
    ids: dict[str, str] = {}
    with suppress(FileNotFoundError, ValueError):
        ids = parsing.decode(read_file(run / TRACKERS_FILE), _IDS)
    tracker = _TRACKERS[name](run, settings, ids.get(name))
    if tracker.id != ids.get(name):
        with atomic_write(run / TRACKERS_FILE) as file:
            file.write(json.dumps({**ids, name: tracker.id}, indent=1).encode())
    return tracker


def _follow(path: Path, start: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and points of each line of a log from a byte on, until standard input ends."""
    with path.open("rb") as file:
        file.seek(start)
        ended, rest = False, b""
        while True:
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in lines:
                values = json.loads(line)
                step = values.pop("step")
                if points := flatten_scalars(values):
                    yield step, points
            # Lines written before the end are read after it.
            if ended:
                return
            ended = bool(select.select([sys.stdin], [], [], _POLL_S)[0])


if __name__ == "__main__":
    _serve()
