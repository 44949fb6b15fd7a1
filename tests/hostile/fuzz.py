"""Mutate files that captionscale reads, run commands that read them, and report those that fail.

    python tests/hostile/fuzz.py --minutes 10
    python tests/hostile/fuzz.py --light --cases 10_000
    python tests/hostile/fuzz.py --seed 7 --case 123

Each case is a fork of this process, in a folder of its own. It fails on a traceback, an exit code other than
0 or 1, an error of several lines, control characters or unescaped markup, too much time or memory, a changed
file that the command does not write, or a pickle that is executed.
"""

import argparse
import gc
import os
import re
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import numpy as np
from fuzz_files import build, copy, seal
from fuzz_formats import mutate_file
from fuzz_mutations import CANARY, MARKUP
from fuzz_targets import TARGETS

import captionscale
from captionscale import cli
from captionscale.errors import UserError
from captionscale.escape import for_terminal

GROWTH_MB = 1_500
"""Memory that a case may take beyond that of this process."""
_ADDRESSES_MB = 3_000
"""Address space that a case gets beyond that of this process, so that the machine is safe."""
_MODULES = (
    "data.packing",
    "data.sources.tars",
    "data.verification",
    "tools.board",
    "tools.launcher",
    "tools.score_file",
    "tools.dataset_stats",
    "tools.submit",
    "tools.watch",
)
_WITH_TORCH = (
    "tools.attend",
    "tools.doctor.doctor",
    "tools.export.bundle",
    "tools.report",
    "tools.scoring",
    "train.loop",
)
_LIGHT = re.compile(
    r"(?:pack|verify|stats|show|config|submit|launch|board|compare|score --captions|leaderboard|watch)\b.*"
)
"""Commands that need no PyTorch, without which a process is forked in a tenth of the time."""
_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f]")
_FRAME = re.compile(r'File "[^"]*/(captionscale/[^"]+)", line (\d+), in (\S+)')
_LISTS_PROBLEMS = ("verify", "config", "train", "submit", "launch", "doctor")
"""Commands that may report each problem of a file on a line of its own."""


@dataclass
class Case:
    """What was done, and what came of it; `problem` is empty if all is well."""

    target: str
    change: str
    command: str
    writes: tuple[str, ...] = ()
    code: int = 0
    output: str = ""
    errors: str = ""
    seconds: float = 0.0
    growth_mb: int = 0
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.change}: {self.command}"

    @property
    def place(self) -> str:
        """Where it failed, the same for cases of one cause."""
        last = self.errors.strip().rpartition("\n")[2]
        if frames := _FRAME.findall(self.errors):
            return f"{self.problem}: {':'.join(frames[-1])}: {last[:100]!r}"
        return f"{self.problem}: {self.target}: {re.sub('[0-9]+', '0', last)[:60]!r}"


def prepare(root: Path, options: argparse.Namespace, number: int) -> Case:
    """Make the folder of a case, which depends on its number and the options alone, and enter it."""
    os.chdir(root)
    shutil.rmtree("case", ignore_errors=True)
    rng = Random(f"{options.seed} {number}")
    allowed = _LIGHT if options.light else re.compile(".*")
    commands = {
        name: lines
        for name, target in TARGETS.items()
        if (lines := [*filter(allowed.fullmatch, target.commands.strip().split("\n"))])
    }
    [name] = rng.choices([*commands], [TARGETS[each].weight for each in commands])
    name = options.target or name
    target = TARGETS[name]
    Path("case/tmp").mkdir(parents=True)
    for each in target.needs.split():
        copy(root / "files" / each, Path("case", each))
    os.chdir("case")
    found = {path for pattern in target.files.split() for path in Path().glob(pattern) if path.is_file()}
    path = rng.choice(sorted(found))
    change = f"{path}: {mutate_file(rng, path)}"
    if rng.random() < 0.7 and path.is_file() and not path.is_symlink() and path.stat().st_size < 2**30:
        try:
            change += ", sealed" * seal(path)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            change += ", cannot be sealed"
    command, _, writes = rng.choice(commands[name]).replace("{}", str(path)).partition(" > ")
    return Case(name, change, command, tuple(writes.split()))


def run(root: Path, case: Case, limit_s: float) -> None:
    """Run a case's command in a fork, and judge what it did."""
    before = _listing(root, case.writes)
    started = time.monotonic()
    child = os.fork()
    if not child:
        _work(case.command)
    descriptor, waiting = os.pidfd_open(child), select.poll()
    waiting.register(descriptor, select.POLLIN)
    ended = waiting.poll(limit_s * 1_000)
    case.seconds = time.monotonic() - started
    os.close(descriptor)
    try:
        # What it started ends with it.
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    case.code = os.waitstatus_to_exitcode(status)
    case.growth_mb = (usage.ru_maxrss - _memory_kib("RssAnon")) // 1_024
    case.output, case.errors = (
        (root / name).read_bytes().decode(errors="backslashreplace") for name in ("output", "errors")
    )
    changed = sorted({path for path, _ in before.items() ^ _listing(root, case.writes).items()})
    case.problem = judge(case, changed) if ended else f"no end after {limit_s:g} s"


def _work(command: str) -> None:
    """Run a command as a process of its own, which this one is, and end."""
    code = 1
    try:
        os.setsid()
        for name, number in (("output", 1), ("errors", 2)):
            os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ |= dict.fromkeys(("TMPDIR", "HOME", "TORCH_HOME"), str(Path("tmp").resolve()))
        tempfile.tempdir = None
        _bound(resource.RLIMIT_AS, (_memory_kib("VmSize") << 10) + (_ADDRESSES_MB << 20))
        _bound(resource.RLIMIT_FSIZE, 1 << 30)
        command_name, *arguments = shlex.split(command)
        if command_name == "load":
            _load(*arguments)
        else:
            cli.main([command_name, *arguments])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _load(run: str, image: str) -> None:
    """Caption an image as a Python program does."""
    try:
        print(captionscale.load(run).caption([image])[0].caption)
    except UserError as error:
        print(f"captionscale: {for_terminal(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None


def _in_fork(work: Callable[[Path], None], folder: Path) -> None:
    """Do work in a fork; an error of it is one here."""
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, "cannot make the files"
        return
    code = 1
    try:
        work(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _bound(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def judge(case: Case, changed: Iterable[str] = ()) -> str:
    """Return what is wrong with what a command did; nothing, if all is well.

    Args:
        case: What it did.
        changed: Files that it changed, though it does not write them.
    """
    said = case.output + case.errors
    _, found, error = case.errors.rpartition("captionscale: ")
    lists = case.command.split()[0] in _LISTS_PROBLEMS
    pages = [*Path().glob("out*.html"), *Path().glob("out*/*.md")]
    problems = {
        "traceback": "Traceback (most recent call last)" in said,
        f"exit code {case.code}": case.code not in (0, 1),
        "no error": case.code == 1 and not found and not (lists and case.output),
        "error of several lines": case.code == 1 and not lists and len(error.strip().split("\n")) > 1,
        "long error": case.code == 1 and not lists and len(error) > 2_000,
        "control characters": bool(_CONTROL.search(said)),
        "markup": any(MARKUP in page.read_text(encoding="utf-8", errors="replace") for page in pages),
        f"over {GROWTH_MB:,} MB": case.growth_mb > GROWTH_MB,
        f"changed {', '.join(changed):.80}": bool(changed),
        "pickle executed": Path(CANARY).exists(),
        "temporary files left": any(Path("tmp").glob("captionscale*")),
    }
    return next((problem for problem, is_so in problems.items() if is_so), "")


def _listing(root: Path, writes: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return size and time of all files but those that the command may write."""
    return {str(path): (facts.st_size, facts.st_mtime_ns) for path, facts in _facts(root, writes)}


def _facts(root: Path, writes: tuple[str, ...]) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, inner, names in os.walk(root):
        place = Path(folder).relative_to(root)
        if place == Path("case"):
            inner[:] = [name for name in inner if name not in ("tmp", *writes) and not name.startswith("out")]
            names = [name for name in names if not name.startswith("out")]
        for name in names:
            if place != Path() or name not in ("output", "errors"):
                yield place / name, (root / place / name).lstat()


def _memory_kib(key: str) -> int:
    """Return a figure of this process's memory."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1])


def _import(light: bool) -> None:
    """Import what the commands do, so that each fork has it."""
    for name in _MODULES if light else (*_MODULES, *_WITH_TORCH):
        import_module(f"captionscale.{name}")
    from captionscale.score.meteor import Meteor

    if not light:
        import torch

        torch.set_num_threads(1)
    # Java takes seconds, and reads none of these files.
    Meteor.statistics = _no_meteor  # type: ignore[method-assign]


def _no_meteor(_: object, texts: Sequence[str], __: object) -> Any:
    return np.zeros((len(texts), 23))


def fuzz(root: Path, options: argparse.Namespace) -> bool:
    """Run cases, and print those that failed and a summary; return whether none failed."""
    places: dict[str, list[int]] = {}
    targets: Counter[str] = Counter()
    growth, slowest = (0, ""), (0.0, "")
    same = f" --target {options.target}" * bool(options.target) + " --light" * options.light
    started = time.monotonic()
    number = options.case or 0
    while True:
        case = prepare(root, options, number)
        run(root, case, options.limit)
        targets[case.target] += 1
        growth = max(growth, (case.growth_mb, str(case)))
        slowest = max(slowest, (case.seconds, str(case)))
        if case.problem:
            places.setdefault(case.place, []).append(number)
            print(f"FAILED {case.place}\n  {case}")
            print(f"  python tests/hostile/fuzz.py --seed {options.seed} --case {number}{same}", flush=True)
            if len(places[case.place]) == 1:
                print("".join(f"  | {line}\n" for line in case.errors[-1_500:].splitlines()), end="")
        number += 1
        spent = time.monotonic() - started
        if options.case is not None or (
            number >= options.cases if options.cases else spent > 60 * options.minutes
        ):
            break
    if options.case is not None:
        print(f"exit code {case.code}; {root / 'case'}\n{case.output}\n{case.errors}")
    print(f"{targets.total():,} cases in {spent:.0f} s, {targets.total() / spent:.1f} a second")
    print(", ".join(f"{name} {count:,}" for name, count in sorted(targets.items())))
    print(
        f"largest growth: {growth[0]:,} MB, {growth[1]:.300}\nslowest: {slowest[0]:.1f} s, {slowest[1]:.300}"
    )
    for place, cases in sorted(places.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases):5} {place}, first in case {cases[0]}")
    print(f"seed {options.seed}: {sum(map(len, places.values())):,} failed, at {len(places):,} places")
    return not places


def main() -> None:
    """Fuzz as the command line says."""
    parser = argparse.ArgumentParser(description="Fuzz every file that captionscale reads.")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--cases", type=int, metavar="N", help="how many cases instead")
    parser.add_argument(
        "--seed", type=int, default=SystemRandom().randrange(10**6), help="(default: a new one)"
    )
    parser.add_argument("--target", choices=TARGETS, help="one kind of files (default: all)")
    parser.add_argument("--case", type=int, metavar="N", help="only this one; its folder is kept")
    parser.add_argument(
        "--light", action="store_true", help="only commands that need no PyTorch: ten times as many cases"
    )
    parser.add_argument(
        "--limit", type=float, default=60.0, metavar="S", help="of a case (default: %(default)s)"
    )
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    # Nothing but this machine is asked.
    os.environ |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        (root / "files").mkdir()
        _import(options.light)
        # It imports PyTorch, and warms up what draws.
        if options.light:
            _in_fork(build, root / "files")
        else:
            build(root / "files")
        gc.freeze()
        (root / "secret").write_text("secret\n")
        good = fuzz(root, options)
    finally:
        os.chdir("/")
        if options.case is None:
            shutil.rmtree(root)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
