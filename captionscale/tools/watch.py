"""`captionscale watch`: follow a run by what it writes, from any machine that sees its folder."""

import os
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
from captionscale.files import LOCK, lock_holder
from captionscale.progress import SafeConsole, format_duration
from captionscale.train import log_reader
from captionscale.train.log_reader import JsonLinesReader
from captionscale.train.run_folder import (
    CONFIG_FILE,
    LOG_FILE,
    STALLS_FILE,
    checkpoint_folder,
    checkpoint_steps,
    require_run,
)

_RECENT = 20
_LATE = 5
"""Times its rhythm after which a run that says nothing is late; scoring and saving may take so long."""
_LEAST_S = 60.0
_MARKS = {
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
    """How a run stands."""

    state: str
    reason: str
    facts: dict[str, str]
    """What else there is to say, by name."""
    fraction_done: float
    """Of its steps that are done; 0: unknown."""
    finished: bool
    """Whether nothing more will come."""

    def line(self) -> str:
        """Return it in one line."""
        return "  ".join(
            [*(f"{name} {value}" for name, value in self.facts.items()), f"{self.state}: {self.reason}"]
        )


class RunWatcher:
    """Looks at one run."""

    def __init__(self, run: Path):
        """Name a run's folder.

        Raises:
            UserError: It is not there, or no run.
        """
        require_run(run)
        signs = (LOG_FILE, LOCK, CONFIG_FILE, "job.sbatch", "checkpoints")
        if not any((run / sign).exists() for sign in signs):
            raise UserError(
                f"{run}: holds no {LOG_FILE}, so no run; wanted the --out of captionscale train or submit; correct"
                " the path"
            )
        self._run = run
        self._log = JsonLinesReader(run / LOG_FILE, log_reader.parse_line)
        self._stalls = JsonLinesReader(run / STALLS_FILE, lambda line: parsing.decode(line, _STALL))

    def status(self) -> RunStatus:
        """Return how the run stands now.

        Raises:
            UserError: Its folder is gone, or cannot be read.
        """
        if not self._run.is_dir():
            raise UserError(f"{self._run}: is gone; wanted the run's folder; correct the path")
        try:
            self._log.read()
            self._stalls.read()
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); make it readable"
            ) from None
        config = self._config()
        learned = [line for line in self._log.lines if "loss" in line]
        last = learned[-1] if learned else {}
        step = max((line["step"] for line in self._log.lines if "step" in line), default=0)
        total = _total(config, learned)
        rhythm_s = _rhythm(config, learned)
        facts = dict(_facts(config, last, step, total))
        pace = _steps_per_s(config, learned)
        if pace and total > step:
            facts["left"] = f"about {format_duration((total - step) / pace)}"
        facts |= _scores(config, self._log.lines)
        saved = checkpoint_steps(self._run)
        facts["checkpoints"] = ", ".join(f"{each:,}" for each in saved) or "none yet"
        if damaged := [f"{it.path.name} {it.damaged:,}" for it in (self._log, self._stalls) if it.damaged]:
            facts["damaged lines"] = f"{', '.join(damaged)} (passed over)"
        state, why = self._state(step, total, rhythm_s)
        return RunStatus(state, why, facts, min(1.0, step / total) if total else 0.0, state == "ended")

    def _config(self) -> Config | None:
        saved = checkpoint_steps(self._run)
        newest = [checkpoint_folder(self._run, saved[-1]) / CONFIG_FILE] if saved else []
        for path in (self._run / CONFIG_FILE, *newest, self._run / "job.toml"):
            # One of another version says nothing that could be relied on.
            with suppress(UserError, OSError):
                if path.is_file():
                    return toml.load(path)
        return None

    def _state(self, step: int, total: int, rhythm_s: float) -> tuple[str, str]:
        """Return one of `_MARKS`, and why."""
        holder, at_work = _holder(self._run)
        age_s = _age(self._run / LOG_FILE)
        silent = (
            f"its log's last line came {format_duration(age_s)} ago" if age_s is not None else "no log yet"
        )
        if rhythm_s:
            silent += f", usually each {format_duration(rhythm_s)}"
        if total and step >= total and not at_work:
            return "ended", f"all {total:,} steps are done"
        if at_work is False:
            last = self._log.lines[-1] if self._log.lines else {}
            if "stop_reason" in last:
                return "not running", f"it left for {last['stop_reason']}; the same command goes on"
            if not holder and age_s is None:
                return "not running", "it has not started; squeue tells of its job"
            died = (
                f"{holder} is gone without a word" if holder else "stopped early, by a signal or by an error"
            )
            return "not running", f"{died}; {silent}"
        late = age_s is not None and age_s > max(_LEAST_S, _LATE * rhythm_s)
        stall = self._stalls.lines[-1] if self._stalls.lines else None
        if stall and (age_s is None or stall.time > time.time() - age_s):
            who = ", ".join(f"rank {it.rank} on {it.host}" for it in stall.stalled)
            return "stalled", f"{who or 'a rank'} keeps the others waiting (stalls.jsonl); {silent}"
        if late:
            return "silent", f"{silent}; it may score or save, or have died: look at the job's log"
        return "alive", silent


def watch(run: Path, *, once: bool, every_s: float) -> None:
    """Show how a run stands, again and again until it has ended.

    Args:
        run: Its folder.
        once: Only now.
        every_s: Seconds between two looks.

    Raises:
        UserError: No run.
    """
    watched = RunWatcher(run)
    out = SafeConsole()
    if once:
        out.print(_picture(run, watched.status()))
        return
    # Ctrl-C is how one leaves.
    with suppress(KeyboardInterrupt):
        if out.is_terminal:
            with Live(console=out, auto_refresh=False) as live:
                for glance in _glances(watched, every_s):
                    live.update(_picture(run, glance), refresh=True)
            return
        said: object = None
        for glance in _glances(watched, every_s):
            # Why changes with every second.
            if (news := (glance.state, glance.facts)) != said:
                said = news
                print(f"{time.strftime('%H:%M:%S')}  {glance.line()}", flush=True)
    sys.stdout.flush()


def _glances(watched: RunWatcher, every_s: float) -> Iterator[RunStatus]:
    while True:
        glance = watched.status()
        yield glance
        if glance.finished:
            return
        time.sleep(every_s)


def _picture(run: Path, glance: RunStatus) -> Group:
    table = Table.grid(padding=(0, 2))
    if glance.fraction_done:
        table.add_row(
            "", ProgressBar(1.0, glance.fraction_done, 50, complete_style="cyan", finished_style="cyan")
        )
    for name, value in glance.facts.items():
        table.add_row(Text(name, "dim"), value)
    title = Text()
    title.append(f"{run}  ", "bold")
    title.append(glance.state, _MARKS[glance.state])
    title.append(f"  {glance.reason}")
    return Group(title, table)


def _facts(config: Config | None, last: dict[str, Any], step: int, total: int) -> Iterator[tuple[str, str]]:
    yield "step", f"{step:,} of {total:,}" if total else f"{step:,}"
    if "epoch" in last:
        of = f" of {config.train.epochs}" if config and not config.train.steps else ""
        yield "epoch", f"{last['epoch']:.2f}{of}"
    if "loss" in last:
        yield "loss", f"{last['loss']:.3f}"
    if "reward" in last:
        yield "reward", f"{last['reward']:.3f}"
    if "images_per_s" in last:
        yield "images/s", f"{last['images_per_s']:,.0f}"


def _scores(config: Config | None, lines: list[dict[str, Any]]) -> dict[str, str]:
    scored = [line for line in lines if isinstance(line.get("scores"), dict)]
    if not scored:
        return {}
    last = scored[-1]
    told = ", ".join(f"{name} {value:.4f}" for name, value in last["scores"].items())
    facts = {"scores": f"{told} (step {last['step']:,})"}
    metric = config.train.score_metric if config else "CIDEr-D"
    if ranked := [line for line in scored if metric in line["scores"]]:
        # The first of equals, as training takes it.
        best = max(ranked, key=lambda line: line["scores"][metric])
        facts["best"] = f"{metric} {best['scores'][metric]:.4f} (step {best['step']:,})"
    return facts


def _total(config: Config | None, learned: list[dict[str, Any]]) -> int:
    """Return the steps of the whole run; 0: unknown."""
    if config is None:
        return 0
    if config.train.steps:
        return config.train.steps
    epoch = learned[-1].get("epoch") if learned else 0
    return round(config.train.epochs * learned[-1]["step"] / epoch) if epoch else 0


def _steps_per_s(config: Config | None, learned: list[dict[str, Any]]) -> float:
    rates = [line["images_per_s"] for line in learned[-_RECENT:] if line.get("images_per_s")]
    return median(rates) / config.train.global_batch if rates and config else 0.0


def _rhythm(config: Config | None, learned: list[dict[str, Any]]) -> float:
    """Return the seconds between two lines of the log; 0: unknown."""
    pace = _steps_per_s(config, learned)
    return config.train.log_every / pace if pace and config else 0.0


def _age(path: Path) -> float | None:
    try:
        # Another machine's clock may be ahead.
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _holder(run: Path) -> tuple[str, bool | None]:
    """Return who says to be at work in a run's folder, and whether that is so; none: unknown, elsewhere."""
    try:
        holder = lock_holder(run)
    except OSError:
        return "", False
    if not holder:
        return "", False
    # As `files.lock` writes it. Its lock is not tried: a run that starts just then would be refused.
    words = holder.split()
    if len(words) < 3 or words[-1] != os.uname().nodename or not words[-3].isdecimal():
        return holder, None
    return holder, Path("/proc", words[-3]).exists()
