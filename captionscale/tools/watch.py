"""The command `watch`: follow a run through the files in its folder."""

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
from captionscale.train import log_reader
from captionscale.train.log_reader import JsonLinesReader
from captionscale.train.run_folder import (
    CONFIG_FILE,
    JOB_CONFIG,
    JOB_SCRIPT,
    LOG_FILE,
    STALLS_FILE,
    checkpoint_folder,
    checkpoint_steps,
    checkpoints_folder,
    require_run,
)

_RECENT = 20
_LATE = 5
"""Times the usual interval of the log after which a run is silent; scoring and saving may take as long."""
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
    """The state of a run."""

    state: str
    reason: str
    facts: dict[str, str]
    fraction_done: float
    """Of the run's steps; 0: unknown."""
    finished: bool

    def line(self) -> str:
        """Return it in one line."""
        facts = [f"{name} {value}" for name, value in self.facts.items()]
        return "  ".join([*facts, f"{self.state}: {self.reason}"])


class RunWatcher:
    """Reads the state of one run."""

    def __init__(self, run: Path):
        """Open a run's folder.

        Raises:
            UserError: It does not exist, or holds no run.
        """
        require_run(run)
        signs = [run / name for name in (LOG_FILE, LOCK, CONFIG_FILE, JOB_SCRIPT)]
        if not any(path.exists() for path in (*signs, checkpoints_folder(run))):
            raise UserError(
                f"{run}: holds no {LOG_FILE}, so no run, expected the --out of captionscale train or submit;"
                " correct the path"
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
        config = self._config()
        trained = [line for line in self._log.lines if "loss" in line]
        last = trained[-1] if trained else {}
        step = max((line["step"] for line in self._log.lines if "step" in line), default=0)
        total = _total(config, trained)
        interval_s = _interval_s(config, trained)
        facts = dict(_facts(config, last, step, total))
        pace = _steps_per_s(config, trained)
        if pace and total > step:
            facts["left"] = f"about {format_duration((total - step) / pace)}"
        facts |= _scores(config, self._log.lines)
        saved = checkpoint_steps(self._run)
        facts["checkpoints"] = ", ".join(f"{each:,}" for each in saved) or "none yet"
        if damaged := [f"{it.path.name} {it.damaged:,}" for it in (self._log, self._stalls) if it.damaged]:
            facts["damaged lines"] = f"{', '.join(damaged)} (skipped)"
        state, why = self._state(step, total, interval_s)
        return RunStatus(state, why, facts, min(1.0, step / total) if total else 0.0, state == "ended")

    def _config(self) -> Config | None:
        saved = checkpoint_steps(self._run)
        newest = [checkpoint_folder(self._run, saved[-1]) / CONFIG_FILE] if saved else []
        for path in (self._run / CONFIG_FILE, *newest, self._run / JOB_CONFIG):
            # One of another version is not used.
            with suppress(UserError, OSError):
                if path.is_file():
                    return toml.load(path)
        return None

    def _state(self, step: int, total: int, interval_s: float) -> tuple[str, str]:
        """Return one of `_STYLES`, and why."""
        holder, running = _holder(self._run)
        age_s = _age(self._run / LOG_FILE)
        last_line = f"last log line {format_duration(age_s)} ago" if age_s is not None else "no log yet"
        if interval_s:
            last_line += f", usually every {format_duration(interval_s)}"
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
        if age_s is not None and age_s > max(_LEAST_S, _LATE * interval_s):
            return "silent", f"{last_line}; it may be scoring or saving, or have died: see the job's log"
        return "alive", last_line


def watch(run: Path, *, once: bool, every_s: float) -> None:
    """Show the state of a run, again and again until it has ended.

    Args:
        run: Its folder.
        once: Show it once.
        every_s: Seconds between two updates.

    Raises:
        UserError: It is no run.
    """
    watcher = RunWatcher(run)
    out = SafeConsole()
    if once:
        out.print(_renderable(run, watcher.status()))
        return
    # Ctrl-C is the way to end it.
    with suppress(KeyboardInterrupt):
        if out.is_terminal:
            with Live(console=out, auto_refresh=False) as live:
                for status in _updates(watcher, every_s):
                    live.update(_renderable(run, status), refresh=True)
            return
        shown: object = None
        for status in _updates(watcher, every_s):
            # The reason changes every second.
            if (news := (status.state, status.facts)) != shown:
                shown = news
                print(f"{time.strftime('%H:%M:%S')}  {status.line()}", flush=True)
    sys.stdout.flush()


def _updates(watcher: RunWatcher, every_s: float) -> Iterator[RunStatus]:
    while True:
        status = watcher.status()
        yield status
        if status.finished:
            return
        time.sleep(every_s)


def _renderable(run: Path, status: RunStatus) -> Group:
    table = Table.grid(padding=(0, 2))
    if status.fraction_done:
        bar = ProgressBar(1.0, status.fraction_done, 50, complete_style="cyan", finished_style="cyan")
        table.add_row("", bar)
    for name, value in status.facts.items():
        table.add_row(Text(name, "dim"), value)
    title = Text()
    title.append(f"{run}  ", "bold")
    title.append(status.state, _STYLES[status.state])
    title.append(f"  {status.reason}")
    return Group(title, table)


def _facts(config: Config | None, last: dict[str, Any], step: int, total: int) -> Iterator[tuple[str, str]]:
    yield "step", f"{step:,} of {total:,}" if total else f"{step:,}"
    if "epoch" in last:
        total_epochs = f" of {config.train.epochs}" if config and not config.train.steps else ""
        yield "epoch", f"{last['epoch']:.2f}{total_epochs}"
    yield from ((key, f"{last[key]:.3f}") for key in ("loss", "reward") if key in last)
    if "images_per_s" in last:
        yield "images/s", f"{last['images_per_s']:,.0f}"


def _scores(config: Config | None, lines: list[dict[str, Any]]) -> dict[str, str]:
    scored = [line for line in lines if isinstance(line.get("scores"), dict)]
    if not scored:
        return {}
    last = scored[-1]
    shown = ", ".join(f"{name} {value:.4f}" for name, value in last["scores"].items())
    facts = {"scores": f"{shown} (step {last['step']:,})"}
    metric = config.train.score_metric if config else "CIDEr-D"
    if ranked := [line for line in scored if metric in line["scores"]]:
        # The first of equals, as in training.
        best = max(ranked, key=lambda line: line["scores"][metric])
        facts["best"] = f"{metric} {best['scores'][metric]:.4f} (step {best['step']:,})"
    return facts


def _total(config: Config | None, trained: list[dict[str, Any]]) -> int:
    """Return the steps of the whole run, estimated from the log if the config gives epochs; 0: unknown."""
    if config is None:
        return 0
    if config.train.steps:
        return config.train.steps
    epoch = trained[-1].get("epoch") if trained else 0
    return round(config.train.epochs * trained[-1]["step"] / epoch) if epoch else 0


def _steps_per_s(config: Config | None, trained: list[dict[str, Any]]) -> float:
    rates = [line["images_per_s"] for line in trained[-_RECENT:] if line.get("images_per_s")]
    return median(rates) / config.train.global_batch if rates and config else 0.0


def _interval_s(config: Config | None, trained: list[dict[str, Any]]) -> float:
    """Return the usual seconds between two lines of the log; 0: unknown."""
    pace = _steps_per_s(config, trained)
    return config.train.log_every / pace if pace and config else 0.0


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
