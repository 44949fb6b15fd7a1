"""The command `drill`: kill and resume a run on other ranks, and compare it with an uninterrupted run."""

import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from rich.table import Table
from torch import Tensor

from captionscale import subprocesses, toml
from captionscale.config import Config
from captionscale.data.sampler import BatchSampler
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.errors import UserError
from captionscale.progress import SafeConsole, progress
from captionscale.train import run_folder, sample_log
from captionscale.train.checkpoint import open_checkpoint
from captionscale.train.log_reader import read_metric
from captionscale.train.setup import make_sampler

# Of weights and losses: ten times the rounding measured over 20 steps, and at most half the effect of one
# wrong dropout mask per step (docs/performance.md).
_TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (1e-3, 1e-2), "fp16": (1e-3, 1e-2)}
_EXPERIMENT = "experiment.toml"
_TIMEOUT_S = 120
_POLL_S = 0.01


@dataclass(frozen=True)
class _Start:
    """One start of the killed run, and how it ended."""

    ranks: int
    step: int
    end: int
    fate: str


def drill(
    config: Config, out: Path, *, profile: str, ranks: Sequence[int], kills: int, steps: int, seed: int
) -> bool:
    """Train twice, once with kills, and print whether both runs have one result.

    Args:
        config: The experiment, of which a few steps are trained.
        out: Folder for both runs.
        profile: As of `captionscale launch`.
        ranks: Numbers of processes; consecutive starts of the killed run use different ones.
        kills: How often to send SIGKILL to all processes, one rank or the launcher alone, while they start or
            after a random step.
        steps: Of each run.
        seed: Of the kills.

    Returns:
        Whether weights, losses and samples are the same.

    Raises:
        UserError: The experiment cannot be drilled, or a start failed by itself.
    """
    # Scoring, once at the end, is not part of the drill.
    fixed = {"steps": steps, "log_every": 1, "score_every": steps}
    settings = config.model_copy(update={"train": config.train.model_copy(update=fixed)})
    _refuse(settings, out, kills, steps)
    split = Split(open_storage(config.data.shards, config.data.cache), config.data.train_split)
    sampler = make_sampler(split, settings)
    sampler.micro_batches(0, 0, max(ranks))
    out.mkdir(parents=True, exist_ok=True)
    reference, killed = out / "uninterrupted", out / "killed"
    (out / _EXPERIMENT).write_text(toml.dumps(settings), encoding="utf-8")
    rng = random.Random(seed)
    with progress("drill", kills + 2, transient=True) as bar:
        bar.note("one rank, uninterrupted")
        startup_s, step_s = _train_uninterrupted(reference, profile, settings)
        bar.advance()
        starts: list[_Start] = []
        # Rising, so that each start has steps left; the last one is not killed.
        for target in [*sorted(rng.sample(range(1, steps), kills)), None]:
            others = [each for each in ranks if not starts or each != starts[-1].ranks]
            count = rng.choice(others or list(ranks))
            bar.note(f"{count} ranks, from step {_newest(killed)}")
            delay_s = rng.uniform(0, step_s)
            # One in four is killed before its first step.
            if target and rng.random() < 0.25:
                target, delay_s = 0, rng.uniform(0, startup_s)
            starts.append(_start(killed, profile, count, target, delay_s, rng))
            bar.say(f"{count} ranks, from step {starts[-1].step}: {starts[-1].fate} at step {starts[-1].end}")
            bar.advance()
    return _compare(reference, killed, starts, sampler, split, settings)


def _refuse(settings: Config, out: Path, kills: int, steps: int) -> None:
    if getattr(settings.model.encoder, "batch_norm", "frozen") == "trained":
        raise UserError(
            "model.encoder.batch_norm = trained: its statistics follow the first rank's images, so results"
            " depend on the ranks, expected frozen; pass --set model.encoder.batch_norm=frozen"
        )
    if kills >= steps:
        raise UserError(
            f"--kills {kills}: a run of {steps} steps has too few, expected more steps than kills;"
            " raise --steps"
        )
    if any((out / name).exists() for name in ("uninterrupted", "killed")):
        raise UserError(f"{out}: holds an earlier drill, expected none; remove it, or choose another --out")


def _train_uninterrupted(run: Path, profile: str, settings: Config) -> tuple[float, float]:
    """Train on one rank; return the seconds to the first step and the seconds per step."""
    began = time.monotonic()
    with _launched(run, profile, 1, settings.train.save_every or settings.train.steps or 1) as process:
        _follow(process, run, 1)
        startup_s = time.monotonic() - began
        _expect_success(process, run)
    return startup_s, settings.train.global_batch / median(read_metric(run, "images_per_s").values())


def _start(
    run: Path, profile: str, ranks: int, target: int | None, delay_s: float, rng: random.Random
) -> _Start:
    """Start the run and kill it after a step; without a target, let it finish."""
    begin, fate = _newest(run), "finished"
    with _launched(run, profile, ranks, rng.randint(1, 3)) as process:
        if target is not None:
            # An earlier start may have come further than planned.
            _follow(process, run, max(target, begin + 1) if target else 0)
            with suppress(subprocess.TimeoutExpired):
                process.wait(delay_s)
        if target is None or process.poll() is not None:
            _expect_success(process, run)
        else:
            fate = _kill(process, rng)
    return _Start(ranks, begin, _step(run), fate)


@contextmanager
def _launched(run: Path, profile: str, ranks: int, save_every: int) -> Iterator[subprocess.Popen[bytes]]:
    """Train in processes that end with this context."""
    launch = ["launch", "--profile", profile, "--processes", str(ranks), "--"]
    train = ["train", str(run.with_name(_EXPERIMENT)), "--out", str(run), "--sample-log"]
    train += ["--set", f"train.save_every={save_every}"]
    with _output(run).open("ab") as output:
        process = subprocesses.start(
            [sys.executable, "-m", "captionscale", *launch, *train], stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            _kill_all(process)


def _follow(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """Wait until the log has a step, or the process has ended."""
    began = time.time()
    while process.poll() is None and max(read_metric(run, "loss", began), default=0) < step:
        time.sleep(_POLL_S)


def _expect_success(process: subprocess.Popen[bytes], run: Path) -> None:
    if process.wait():
        lines = _output(run).read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing"]
        raise UserError(
            f"{_output(run)}: a start that was not killed ended with exit code {process.returncode},"
            f" expected 0; correct what its last line says: {lines[-1]}"
        )


def _kill(process: subprocess.Popen[bytes], rng: random.Random) -> str:
    """Kill one rank, the launcher alone, or all processes; return which."""
    launcher = psutil.Process(process.pid)
    ranks, started = launcher.children(), [launcher, *launcher.children(recursive=True)]
    fate = rng.choice(("one rank killed", "launcher killed", "all killed")) if ranks else "all killed"
    if fate == "all killed":
        _kill_all(process)
    elif fate == "launcher killed":
        process.kill()
        process.wait()
    else:
        with suppress(psutil.NoSuchProcess):
            rng.choice(ranks).kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_TIMEOUT_S)
    # They hold the run's lock until they have ended, and are no children of this process.
    deadline = time.monotonic() + _TIMEOUT_S
    while (alive := [each for each in started if _is_alive(each)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if alive:
        fate += f", {len(alive)} processes had not ended {_TIMEOUT_S} s later"
        for each in alive:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    return fate


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    subprocesses.kill_tree(process)
    process.wait()


def _newest(run: Path) -> int:
    return max(run_folder.checkpoint_steps(run), default=0)


def _step(run: Path) -> int:
    return max(read_metric(run, "loss"), default=0)


def _output(run: Path) -> Path:
    return run.with_name(run.name + ".txt")


def _compare(
    reference: Path,
    killed: Path,
    starts: Sequence[_Start],
    sampler: BatchSampler,
    split: Split,
    settings: Config,
) -> bool:
    """Print how the runs compare, and return whether they have one result."""
    steps = settings.train.steps or 0
    weights_tolerance, losses_tolerance = _TOLERANCE[settings.train.precision]
    weights = _distance(*(open_checkpoint(run, "last").weights() for run in (killed, reference)))
    losses = [read_metric(run, "loss") for run in (killed, reference)]
    max_difference = max(abs(losses[0].get(step, math.inf) - loss) for step, loss in losses[1].items())
    histories = [sample_log.read(run) for run in (killed, reference)]
    ids = split.index["image_id"].tolist()
    faults = [
        fault for history in histories for fault in sample_log.find_errors(history, sampler, ids, steps)
    ]
    samples = sum(len(ids) for batches in histories[0].values() for ids in batches)
    verdict = f"{len(faults)} faults: {faults[0]}" if faults else "each sample of each epoch exactly once"
    findings = {
        f"weights: relative difference {weights:.1e}, allowed {weights_tolerance:.0e}": (
            weights <= weights_tolerance
        ),
        f"{len(losses[0])} losses: difference {max_difference:.1e}, allowed {losses_tolerance:.0e}": (
            max_difference <= losses_tolerance and len(losses[0]) == steps
        ),
        f"sample log: {samples:,} samples in {len(histories[0]):,} micro-batches: {verdict}": not faults,
        "the same samples in each micro-batch of both runs": histories[0] == histories[1],
        "no process outlived a kill": not any("had not ended" in start.fate for start in starts),
    }
    out = SafeConsole()
    table = Table("start", "ranks", "from step", "to step", "repeated", "fate")
    for number, start in enumerate(starts):
        repeated = max(0, start.end - starts[number + 1].step) if start is not starts[-1] else 0
        table.add_row(*map(str, (number + 1, start.ranks, start.step, start.end, repeated, start.fate)))
    out.print(table)
    for finding, holds in findings.items():
        out.print(f"{'ok     ' if holds else 'DIFFERS'} {finding}", soft_wrap=True)
    kills = sum("killed" in start.fate for start in starts)
    ranks = ", ".join(str(start.ranks) for start in starts)
    verdict = "one result" if all(findings.values()) else "DIFFERS"
    out.print(
        f"{verdict}: {steps} steps, killed {kills} times on {ranks} ranks, against an uninterrupted run",
        soft_wrap=True,
    )
    return all(findings.values())


def _distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of all weights, relative to the norm of all weights."""
    if found.keys() != expected.keys():
        return math.inf
    squares = [
        ((found[name].double() - tensor.double()).square().sum(), tensor.double().square().sum())
        for name, tensor in expected.items()
    ]
    difference, size = (float(sum(column)) for column in zip(*squares, strict=True))
    return math.sqrt(difference / size)
