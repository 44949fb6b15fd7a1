"""The documentation is right: its commands run, the tests that it names exist, its pages load nothing."""

import ast
import doctest
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree, rmtree, which
from typing import Any

import pytest
import readers_folder

from captionscale import toml
from captionscale.cli import main
from captionscale.commands.parser import parser

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("shards", "launch", "slurm")),
]
ELSEWHERE = {"make quickstart": ".ci/run", "make test": ".ci/run"}
"""Commands that are not run here, and the file of which one is a line."""
IMAGES = " ".join(f"--expect {split}={count}" for split, count in (("train", 48), ("val", 8), ("test", 8)))
ADDED = {
    # The drawn scenes are fewer than what the recipes expect.
    r"^bash shards/\w+\.sh \S+ \S+": rf"\g<0> {IMAGES}",
    # An error of the server is one of the command.
    r"^curl ": "curl --fail --silent --show-error ",
}
"""What is added to commands."""
PROGRAM = r"(\$ )?(captionscale|make|bash|sbatch|python|source|pip|curl|wandb|tensorboard) "
LANGUAGES = {"bash", "python", "pycon", "toml", "text"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, block at line {self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page; what is not in one has an empty language, a line each."""
    language, start, inside = "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```") and not start:
            language, start, inside = line[3:], number, []
        elif line.startswith("```"):
            yield Block(page, start, language or "?", "\n".join(inside) + "\n")
            language, start = "", 0
        elif start:
            inside.append(line)
        else:
            yield Block(page, number, "", line)


def commands(text: str) -> list[str]:
    """Return the commands of a block, a line each, without comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in text.replace("\\\n", " ").splitlines())
    return [line.strip() for line in lines if line.strip()]


def written(line: str) -> Iterator[str]:
    """Yield what a command makes that the reader has not made before: shards, a run."""
    words = shlex.split(line)
    if words[:1] == ["bash"] and len(words) > 3:
        yield words[3]
    elif words[:1] == ["captionscale"] and {"pack", "train"} & set(words) and "--out" in words:
        yield words[words.index("--out") + 1]


@pytest.fixture(scope="module")
def furnished(
    synthetic_coco: Path,
    warm_meteor: None,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What each page finds, not to be changed."""
    folder = tmp_path_factory.mktemp("reader")
    readers_folder.make_folder(folder, synthetic_coco)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        readers_folder.run_setup_commands()
    return folder


@pytest.fixture
def reader(
    furnished: Path, s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator["Reader"]:
    """Someone who types what a page says."""
    from captionscale.tools import launcher, leaderboard
    from captionscale.tools.doctor import report, throughput

    folder = copytree(furnished, tmp_path / "reader", symlinks=True)
    for file in (folder / "data" / "coco").iterdir():
        s3_client.put_object(Bucket="bucket", Key=f"coco/{file.name}", Body=file.read_bytes())
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for name, value in {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}:{os.environ['PYTHONPATH']}:{ROOT}",
        "CAPTIONSCALE_CACHE": str(folder / "cache"),
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "OMP_NUM_THREADS": "1",
        # The profiles for GPUs too.
        "ACCELERATE_USE_CPU": "true",
    }.items():
        monkeypatch.setenv(name, value)
    # Processes are launched by tests/test_journey.py and others.
    monkeypatch.setattr(launcher, "_run", launched)
    # It would end pytest too, if a check hung.
    monkeypatch.setattr(report, "exit_process", expect_nothing_refused)
    # Loading is measured for four seconds, to be accurate.
    monkeypatch.setattr(throughput, "_LOAD_S", 0.1)
    for name, board in leaderboard.LEADERBOARDS.items():
        monkeypatch.setitem(leaderboard.LEADERBOARDS, name, replace(board, images=8))
    someone = Reader()
    yield someone
    someone.leave()
    # Another test would be given what a page's plug-in is here.
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


def launched(arguments: list[str]) -> None:
    """Do in this process what `accelerate launch` is told to do in others."""
    main(arguments[arguments.index("captionscale") + 1 :])


def expect_nothing_refused(code: int) -> None:
    """Take the place of what ends a doctor."""
    assert code == 0


class Reader:
    """Types commands in the folder that they are to be typed in."""

    def __init__(self) -> None:
        self.names: dict[str, object] = {}
        self.servers: list[subprocess.Popen[str]] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def type(self, block: Block) -> None:
        """Do what a block says, and expect that it works."""
        match block.language:
            case "bash":
                lines = [line for line in commands(block.text) if line not in ELSEWHERE]
                for path in {path for line in lines for path in written(line)}:
                    rmtree(path, ignore_errors=True)
                # What a shell remembers from line to line.
                ours = itertools.groupby(lines, lambda line: bool(re.match("captionscale (?!demo)", line)))
                for alone, group in ours:
                    for script in group if alone else ["\n".join(group)]:
                        self._run(script)
            case "python":
                if name := re.match(r"# (\w+\.py)\n", block.text):
                    Path(name[1]).write_text(block.text, encoding="utf-8")
                exec(compile(block.text, str(block), "exec"), self.names)
            case "pycon":
                test = doctest.DocTestParser().get_doctest(block.text, self.names, str(block), None, 0)
                found = doctest.DocTestRunner().run(test, clear_globs=False)
                assert (found.failed, bool(found.attempted)) == (0, True)
                self.names |= test.globs
            case "toml":
                Path("own.toml").write_text(block.text)
                toml.load("own.toml")

    def _run(self, script: str) -> None:
        for pattern, replacement in ADDED.items():
            script = re.sub(pattern, replacement, script, flags=re.MULTILINE)
        print(f"\n$ {script}")
        words = shlex.split(script) if "\n" not in script else []
        if words[:2] == ["captionscale", "demo"]:
            self._serve(words[1:])
        elif words[:1] == ["captionscale"]:
            main(words[1:])
        else:
            script = script.replace(":7860", f":{self.port}")
            shell = ["bash", "-euo", "pipefail", "-c", script]
            done = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=300)
            assert done.returncode == 0, f"{script}\n{done.stderr}"

    def _serve(self, words: list[str]) -> None:
        command = [sys.executable, "-m", "captionscale", *words, "--port", str(self.port)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.servers.append(server)
        assert server.stdout is not None
        assert f":{self.port}" in server.stdout.readline()

    def leave(self) -> None:
        """Stop what serves."""
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=600)
            assert server.returncode == 0


needs_programs = pytest.mark.skipif(None in map(which, ("bash", "curl")), reason="needs bash and curl")
RUNNABLE = [page for page in PAGES if any(block.language in LANGUAGES - {"text"} for block in blocks(page))]


@needs_programs
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_does_what_it_should(page: Path, reader: Reader) -> None:
    for block in blocks(page):
        if block.language not in ("", "text"):
            print(f"\n{block}")
            reader.type(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_where_it_is_not_run(page: Path) -> None:
    for block in blocks(page):
        assert block.language in {"", *LANGUAGES}, f"{block}: expected one of {LANGUAGES} behind its ```"
        # Markdown takes what is indented by four for code too.
        place = {"": "    ", "text": " *"}.get(block.language)
        if place is not None:
            hidden = [line for line in block.text.splitlines() if re.match(place + PROGRAM, line)]
            assert hidden == [], f"{block}: a command, expected it in a block of bash"


def test_what_is_run_elsewhere_is() -> None:
    said = [command for page in PAGES for block in blocks(page) for command in commands(block.text)]
    for command, place in ELSEWHERE.items():
        assert command in said
        assert command in (ROOT / place).read_text().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_can_be_said(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(block.text for block in blocks(page) if not block.language)
    for found in re.findall(r"`captionscale ([^`]+)`", text):
        # Many sentences speak of a command alone.
        with suppress(SystemExit):
            parser().parse_args(shlex.split(found.replace("...", "")))
        error = capsys.readouterr().err
        assert not error or "arguments are required" in error, found


def test_every_test_that_is_named_exists() -> None:
    """As `tests/FOLDER/test_FILE.py`, or with `::test_NAME` behind it."""
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8")))
    assert len([name for _, name in named if name]) > 20
    for file, names in itertools.groupby(sorted(named), lambda each: each[0]):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for _, name in names:
            assert not name or name in functions, f"{file}::{name}"


def test_pages_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    loaded = [
        (page.name, place)
        for page in tmp_path.rglob("*.html")
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        for place in re.findall(r'\b(?:src|href)="([^"]*)"', tag)
    ]
    assert len(loaded) > len(PAGES)
    assert [it for it in loaded if re.match(r"\w+:|//", it[1])] == []
