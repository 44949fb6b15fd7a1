"""The command `drill`: kill a run at random, go on with other ranks, and compare it with one left alone."""

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
from captionscale.train import checkpoints, run_folder, sample_log
from captionscale.train.log_reader import read_metric
from captionscale.train.setup import make_sampler

# Of weights and of losses: ten times what rounding was seen to do in 20 steps, and at most half of what one
# wrong dropout mask for each step does (docs/performance.md).
_TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (1e-3, 1e-2), "fp16": (1e-3, 1e-2)}
_EXPERIMENT = "experiment.toml"
_PATIENCE_S = 120
_LOOK_S = 0.01


@dataclass(frozen=True)
class _Start:
    """One start of the killed run, and what became of it."""

    ranks: int
    step: int
    end: int
    fate: str


def drill(
    config: Config, out: Path, *, profile: str, ranks: Sequence[int], kills: int, steps: int, seed: int
) -> bool:
    """Train twice, once with accidents, and print whether both came to one result.

    Args:
        config: The experiment, of which a few steps are trained.
        out: Folder for both runs.
        profile: As `captionscale launch` takes it.
        ranks: Numbers of processes; each start of the killed run takes another one.
        kills: Accidents: SIGKILL to all processes, to one rank or to the launcher alone, while they start or
            after a random step.
        steps: Of each run.
        seed: Of the accidents.

    Returns:
        Whether weights, losses and samples are the same.

    Raises:
        UserError: What cannot be drilled, or a start that failed by itself.
    """
    # It is scored once, at its end, which is no part of the drill.
    fixed = {"steps": steps, "log_every": 1, "score_every": steps, "sample_log": True}
    settings = config.model_copy(update={"train": config.train.model_copy(update=fixed)})
    _refuse(settings, out, kills, steps)
    split = Split(open_storage(config.data.shards, config.data.cache), config.data.train_split)
    sampler = make_sampler(split, settings)
    sampler.micro_batches(0, 0, max(ranks))
    out.mkdir(parents=True, exist_ok=True)
    alone, killed = out / "alone", out / "killed"
    (out / _EXPERIMENT).write_text(toml.dumps(settings), encoding="utf-8")
    chance = random.Random(seed)
    with progress("drill", kills + 2, transient=True) as bar:
        bar.note("one rank, left alone")
        startup_s, pace_s = _leave_alone(alone, profile, settings)
        bar.advance()
        starts: list[_Start] = []
        # Rising, so that each start has something left to do; the last one is left alone.
        for target in [*sorted(chance.sample(range(1, steps), kills)), None]:
            others = [each for each in ranks if not starts or each != starts[-1].ranks]
            count = chance.choice(others or list(ranks))
            bar.note(f"{count} ranks, from step {_newest(killed)}")
            delay_s = chance.uniform(0, pace_s)
            # One in four dies before its first step.
            if target and chance.random() < 0.25:
                target, delay_s = 0, chance.uniform(0, startup_s)
            starts.append(_start(killed, profile, count, target, delay_s, chance))
            bar.say(f"{count} ranks, from step {starts[-1].step}: {starts[-1].fate} at step {starts[-1].end}")
            bar.advance()
    return _judge(alone, killed, starts, sampler, split, settings)


def _refuse(settings: Config, out: Path, kills: int, steps: int) -> None:
    if settings.model.encoder.batch_norm == "trained":
        raise UserError(
            "model.encoder.batch_norm = trained: its statistics follow the first rank's pictures, so that"
            " results depend on the ranks; wanted frozen; pass --set model.encoder.batch_norm=frozen"
        )
    if kills >= steps:
        raise UserError(
            f"--kills {kills}: a run of {steps} steps has too few to be killed after;"
            " wanted more steps than kills; raise --steps"
        )
    if any((out / name).exists() for name in ("alone", "killed")):
        raise UserError(f"{out}: holds an earlier drill, wanted none; remove it, or take another --out")


def _leave_alone(run: Path, profile: str, settings: Config) -> tuple[float, float]:
    """Train on one rank; return the seconds to the first step, and those of a step."""
    began = time.monotonic()
    with _launched(run, profile, 1, settings.train.save_every or settings.train.steps or 1) as process:
        _follow(process, run, 1)
        startup_s = time.monotonic() - began
        _expect_success(process, run)
    return startup_s, settings.train.global_batch / median(read_metric(run, "images_per_s").values())


def _start(
    run: Path, profile: str, ranks: int, target: int | None, delay_s: float, chance: random.Random
) -> _Start:
    """Start the run, let it come to a step, and kill it; without a target, let it finish."""
    begin, fate = _newest(run), "finished"
    with _launched(run, profile, ranks, chance.randint(1, 3)) as process:
        if target is not None:
            # The run before may have come further than was planned.
            _follow(process, run, max(target, begin + 1) if target else 0)
            with suppress(subprocess.TimeoutExpired):
                process.wait(delay_s)
        if target is None or process.poll() is not None:
            _expect_success(process, run)
        else:
            fate = _kill(process, chance)
    return _Start(ranks, begin, _step(run), fate)


@contextmanager
def _launched(run: Path, profile: str, ranks: int, save_every: int) -> Iterator[subprocess.Popen[bytes]]:
    """Train in processes that do not outlive this context."""
    launch = ["launch", "--profile", profile, "--processes", str(ranks), "--"]
    verb = ["train", str(run.with_name(_EXPERIMENT)), "--out", str(run)]
    verb += ["--set", f"train.save_every={save_every}"]
    with _screen(run).open("ab") as screen:
        process = subprocesses.start(
            [sys.executable, "-m", "captionscale", *launch, *verb], stdout=screen, stderr=screen
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            _kill_all(process)


def _follow(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """Wait until the log tells of a step, or the process has ended."""
    began = time.time()
    while process.poll() is None and max(read_metric(run, "loss", began), default=0) < step:
        time.sleep(_LOOK_S)


def _expect_success(process: subprocess.Popen[bytes], run: Path) -> None:
    if process.wait():
        said = _screen(run).read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing"]
        raise UserError(
            f"{_screen(run)}: nobody killed it, and yet it failed with exit code {process.returncode};"
            f" wanted 0; its last words: {said[-1]}"
        )


def _kill(process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Kill one rank, the launcher alone, or all that runs; return which."""
    launcher = psutil.Process(process.pid)
    ranks, started = launcher.children(), [launcher, *launcher.children(recursive=True)]
    fate = chance.choice(("one rank killed", "launcher killed", "all killed")) if ranks else "all killed"
    if fate == "all killed":
        _kill_all(process)
    elif fate == "launcher killed":
        process.kill()
        process.wait()
    else:
        with suppress(psutil.NoSuchProcess):
            chance.choice(ranks).kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
    # They are no children of ours; until they have ended, they hold the run's lock.
    deadline = time.monotonic() + _PATIENCE_S
    while (alive := [each for each in started if _is_alive(each)]) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    if alive:
        fate += f", {len(alive)} processes had not ended {_PATIENCE_S} s later"
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


def _screen(run: Path) -> Path:
    return run.with_name(run.name + ".txt")


def _judge(
    alone: Path, killed: Path, starts: Sequence[_Start], sampler: BatchSampler, split: Split, settings: Config
) -> bool:
    """Print what both runs came to, and return whether it is one result."""
    steps = settings.train.steps or 0
    of_weights, of_losses = _TOLERANCE[settings.train.precision]
    weights = _distance(*(checkpoints.open_checkpoint(run, "last").weights() for run in (killed, alone)))
    losses = [read_metric(run, "loss") for run in (killed, alone)]
    apart = max(abs(losses[0].get(step, math.inf) - loss) for step, loss in losses[1].items())
    histories = [sample_log.read(run) for run in (killed, alone)]
    ids = split.index["image_id"].tolist()
    faults = [
        fault for history in histories for fault in sample_log.find_errors(history, sampler, ids, steps)
    ]
    samples = sum(len(ids) for dones in histories[0].values() for ids in dones)
    proof = f"{len(faults)} faults: {faults[0]}" if faults else "each sample of each epoch exactly once"
    findings = {
        f"weights: {weights:.1e} of their norm apart, allowed {of_weights:.0e}": weights <= of_weights,
        f"losses of {len(losses[0])} steps: {apart:.1e} apart at most, allowed {of_losses:.0e}": (
            apart <= of_losses and len(losses[0]) == steps
        ),
        f"ledger: {samples:,} samples in {len(histories[0]):,} micro-batches: {proof}": not faults,
        "the same samples in each micro-batch of both runs": histories[0] == histories[1],
        "no process outlived a kill": not any("had not ended" in start.fate for start in starts),
    }
    out = SafeConsole()
    table = Table("start", "ranks", "from step", "to step", "done again", "fate")
    for number, start in enumerate(starts):
        again = max(0, start.end - starts[number + 1].step) if start is not starts[-1] else 0
        table.add_row(*map(str, (number + 1, start.ranks, start.step, start.end, again, start.fate)))
    out.print(table)
    for finding, holds in findings.items():
        out.print(f"{'ok     ' if holds else 'DIFFERS'} {finding}", soft_wrap=True)
    kills = sum("killed" in start.fate for start in starts)
    ranks = ", ".join(str(start.ranks) for start in starts)
    verdict = "one result" if all(findings.values()) else "DIFFERS"
    out.print(
        f"{verdict}: {steps} steps, killed {kills} times on {ranks} ranks, beside one rank left alone",
        soft_wrap=True,
    )
    return all(findings.values())


def _distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of all weights by the norm of all weights."""
    if found.keys() != expected.keys():
        return math.inf
    squares = [
        ((found[name].double() - tensor.double()).square().sum(), tensor.double().square().sum())
        for name, tensor in expected.items()
    ]
    difference, size = (float(sum(column)) for column in zip(*squares, strict=True))
    return math.sqrt(difference / size)
