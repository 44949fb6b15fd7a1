"""The command `watch`: follow a run through the files in its folder."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from captionscale import parsing, toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.files import LOCK, is_alive, lock_holder
from captionscale.progress import SafeConsole, format_duration
from captionscale.train import log_reader, run_folder
from captionscale.train.log_reader import JsonLinesReader
from captionscale.train.run_folder import CONFIG_FILE, JOB_CONFIG, JOB_SCRIPT, LOG_FILE, STALLS_FILE

_RECENT = 20
_LATE = 5  # times the usual interval of the log: then a run is silent; scoring and saving may take as long
_LEAST_S = 60.0
_STYLES = {
    "alive": "green",
    "silent": "yellow",
    "stalled": "bold red",
    "ended": "cyan",
    "not running": "yellow",
}


class _Stalled(msgspec.Struct):
    rank: int = -1
    host: str = ""


class _Stall(msgspec.Struct):
    """A line of stalls.jsonl."""

    time: float = 0.0
    stalled: list[_Stalled] = []


_STALL = msgspec.json.Decoder(_Stall)


@dataclass(frozen=True)
class RunStatus:
    """The state of a run: one of `_STYLES`, why, and values by name; an unknown value is None."""

    state: str
    reason: str
    values: dict[str, Any]

    @property
    def facts(self) -> dict[str, str]:
        """The known values as text."""
        return dict(_describe(self.values))


class RunWatcher:
    """Reads the state of one run."""

    def __init__(self, run: Path):
        """Open a run's folder.

        Raises:
            UserError: It does not exist, or holds no run.
        """
        run_folder.require_run(run)
        signs = [run / name for name in (LOG_FILE, LOCK, CONFIG_FILE, JOB_SCRIPT)]
        if not any(path.exists() for path in (*signs, run_folder.checkpoints_folder(run))):
            raise UserError(
                f"{run}: holds no {LOG_FILE}, so no run, expected the --out of captionscale train"
                " or submit; correct the path"
            )
        self._run = run
        self._log = JsonLinesReader(run / LOG_FILE, log_reader.parse_line)
        self._stalls = JsonLinesReader(run / STALLS_FILE, lambda line: parsing.decode(line, _STALL))

    def status(self) -> RunStatus:
        """Return the current state.

        Raises:
            UserError: The folder is gone, or cannot be read.
        """
        if not self._run.is_dir():
            raise UserError(f"{self._run}: is gone, expected the run's folder; correct the path")
        try:
            self._log.read()
            self._stalls.read()
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}), expected a readable file; correct its"
                " permissions"
            ) from None
        config, lines = self._config(), self._log.lines
        train = config.train if config else None
        trained = [line for line in lines if "loss" in line]
        last = trained[-1] if trained else {}
        epoch, step = last.get("epoch"), max((line["step"] for line in lines), default=0)
        total = train.steps if train else None
        if train and not total and epoch:
            # Estimated, as the log does not have the size of the train split.
            total = round(train.epochs * last["step"] / epoch)
        rates = [line["images_per_s"] for line in trained[-_RECENT:] if line.get("images_per_s")]
        step_s = train.global_batch / median(rates) if train and rates else None
        values = {
            "step": step,
            "total_steps": total,
            "epoch": epoch,
            "total_epochs": train.epochs if train and not train.steps else None,
            **{key: last.get(key) for key in ("loss", "reward", "images_per_s")},
            "left_s": step_s * (total - step) if step_s and total and total > step else None,
            **_scores(lines, train.score_metric if train else "CIDEr-D"),
            "checkpoints": run_folder.checkpoint_steps(self._run),
            "damaged_lines": {it.path.name: it.damaged for it in (self._log, self._stalls) if it.damaged},
        }
        usual_s = train.log_every * step_s if train and step_s else None
        return RunStatus(*self._state(step, total, usual_s), values)

    def _config(self) -> Config | None:
        saved = run_folder.checkpoint_steps(self._run)
        newest = [run_folder.checkpoint_folder(self._run, saved[-1]) / CONFIG_FILE] if saved else []
        for path in (self._run / CONFIG_FILE, *newest, self._run / JOB_CONFIG):
            # One of another version is not used.
            with suppress(UserError, OSError):
                if path.is_file():
                    return toml.load(path)
        return None

    def _state(self, step: int, total: int | None, usual_s: float | None) -> tuple[str, str]:
        """Return one of `_STYLES`, and why."""
        holder, running = _holder(self._run)
        age_s = _age(self._run / LOG_FILE)
        last_line = f"last log line {format_duration(age_s)} ago" if age_s is not None else "no log yet"
        if usual_s:
            last_line += f", usually every {format_duration(usual_s)}"
        if total and step >= total and not running:
            return "ended", f"all {total:,} steps are done"
        if running is False:
            last = self._log.lines[-1] if self._log.lines else {}
            if "stop_reason" in last:
                return "not running", f"stopped by {last['stop_reason']}; the same command resumes it"
            if not holder and age_s is None:
                return "not running", "it has not started; see squeue for its job"
            ending = (
                f"{holder} died without a message" if holder else "stopped early, by a signal or an error"
            )
            return "not running", f"{ending}; {last_line}"
        stall = self._stalls.lines[-1] if self._stalls.lines else None
        if stall and (age_s is None or stall.time > time.time() - age_s):
            who = ", ".join(f"rank {it.rank} on {it.host}" for it in stall.stalled)
            return "stalled", f"the others wait for {who or 'a rank'} ({STALLS_FILE}); {last_line}"
        if age_s is not None and age_s > max(_LEAST_S, _LATE * (usual_s or 0)):
            return "silent", f"{last_line}; it may be scoring or saving, or have died: see the job's log"
        return "alive", last_line


def watch(run: Path, *, once: bool, as_json: bool, every_s: float) -> None:
    """Show the state of a run every `every_s` seconds until it has ended, or once; as JSON only once.

    Raises:
        UserError: It is no run.
    """
    watcher = RunWatcher(run)
    out = SafeConsole()
    if as_json:
        status = watcher.status()
        facts = {"run": str(run), "state": status.state, "reason": status.reason, **status.values}
        print(json.dumps(facts, indent=1))
    elif once:
        out.print(_renderable(run, watcher.status()))
    else:
        # Ctrl-C is the way to end it.
        with suppress(KeyboardInterrupt):
            _follow(run, _updates(watcher, every_s), out)
        sys.stdout.flush()


def _follow(run: Path, updates: Iterator[RunStatus], out: SafeConsole) -> None:
    if out.is_terminal:
        with Live(console=out, auto_refresh=False) as live:
            for status in updates:
                live.update(_renderable(run, status), refresh=True)
        return
    shown: object = None
    for status in updates:
        # The reason changes every second.
        if (news := (status.state, status.values)) != shown:
            shown = news
            facts = [f"{name} {value}" for name, value in status.facts.items()]
            print(time.strftime("%H:%M:%S"), *facts, f"{status.state}: {status.reason}", sep="  ", flush=True)


def _updates(watcher: RunWatcher, every_s: float) -> Iterator[RunStatus]:
    while True:
        status = watcher.status()
        yield status
        if status.state == "ended":
            return
        time.sleep(every_s)


def _renderable(run: Path, status: RunStatus) -> Group:
    table, step, total = Table.grid(padding=(0, 2)), status.values["step"], status.values["total_steps"]
    if step and total:
        bar = ProgressBar(total, min(step, total), 50, complete_style="cyan", finished_style="cyan")
        table.add_row("", bar)
    for name, value in status.facts.items():
        table.add_row(Text(name, "dim"), value)
    title = Text()
    title.append(f"{run}  ", "bold")
    title.append(status.state, _STYLES[status.state])
    title.append(f"  {status.reason}")
    return Group(title, table)


def _describe(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, form in (("step", ","), ("epoch", ".2f")):
        if values[key] is not None:
            total = values[f"total_{key}s"]
            yield key, f"{values[key]:{form}}" + (f" of {total:,}" if total else "")
    for key in ("loss", "reward"):
        if values[key] is not None:
            yield key, f"{values[key]:.3f}"
    if values["images_per_s"] is not None:
        yield "images/s", f"{values['images_per_s']:,.0f}"
    if values["left_s"] is not None:
        yield "left", f"about {format_duration(values['left_s'])}"
    for name in ("scores", "best"):
        if found := values[name]:
            shown = ", ".join(f"{metric} {score:.4f}" for metric, score in found["scores"].items())
            yield name, f"{shown} (step {found['step']:,})"
    yield "checkpoints", ", ".join(f"{each:,}" for each in values["checkpoints"]) or "none yet"
    if damaged := [f"{name} {count:,}" for name, count in values["damaged_lines"].items()]:
        yield "damaged lines", f"{', '.join(damaged)} (skipped)"


def _scores(lines: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Return step and scores of the last validation, and of the best one by a metric."""
    scored = [{"step": line["step"], "scores": line["scores"]} for line in lines if line.get("scores")]
    ranked = [
        {**each, "scores": {metric: each["scores"][metric]}} for each in scored if metric in each["scores"]
    ]
    # The first of equals, as in training.
    best = max(ranked, key=lambda each: each["scores"][metric], default=None)
    return {"scores": scored[-1] if scored else None, "best": best}


def _age(path: Path) -> float | None:
    try:
        # Another machine's clock may be ahead.
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _holder(run: Path) -> tuple[str, bool | None]:
    """Return the process that writes a run, and whether it exists; None: it is on another machine."""
    # Its lock is not tried: a run that starts at that moment would be refused.
    try:
        holder = lock_holder(run)
    except OSError:
        holder = ""
    return holder, is_alive(holder) if holder else False
