"""No process of a command outlives the one that started it, whatever either is doing."""

import ast
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import psutil
import pytest
from experiment import load_weights, logged_losses, max_abs_difference, tiny_config

import captionscale
from captionscale import subprocesses
from captionscale.train import loop

# Processes are found by their environments in /proc.
pytestmark = pytest.mark.usefixtures("started")

PACKAGE = Path(captionscale.__file__).parent
MARK = "CAPTIONSCALE_TEST_MARK"
DEADLINE_S = 120


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[psutil.Process]]]:
    """Return a function that finds all living processes that this test started, and theirs."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)

    def find() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
                if alive and process.environ().get(MARK) == mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    yield find
    for process in find():
        process.kill()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def expect_no_survivor(process: "subprocess.Popen[str]", marked: Callable[[], list[psutil.Process]]) -> None:
    process.kill()
    process.communicate()
    wait_for(lambda: not marked())


GENERATIONS = r"""
import os, signal, sys, threading
from captionscale import subprocesses
depth = int(sys.argv[1])
def start():
    command = [sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]] if depth else ["sleep", "1000"]
    started.append(subprocesses.start(command))
started = []
# The thread that asks for a process may end before it.
thread = threading.Thread(target=start)
thread.start()
thread.join()
if depth == 0:
    while open(f"/proc/{started[0].pid}/comm").read() != "sleep\n":
        pass
    os.kill(started[0].pid, signal.SIGSTOP)
    print("ready", flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# Holds the GIL, as an import of a large library does.
sum(range(10**12)) if depth == 1 else signal.pause()
"""


def test_each_generation_ends_with_a_killed_process_even_stopped_or_busy_ones(marked) -> None:
    process = start("-c", GENERATIONS, "2", GENERATIONS)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(marked()) == 4
    expect_no_survivor(process, marked)


def test_a_child_outlives_the_thread_that_asked_for_it() -> None:
    # PR_SET_PDEATHSIG is sent when the thread ends that started the process.
    started = []

    def echo(word: str) -> str:
        cat = started[0]
        cat.stdin.write(word)
        cat.stdin.flush()
        return str(cat.stdout.readline())

    def ask() -> None:
        started.append(subprocesses.start(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert echo("first\n") == "first\n"

    thread = Thread(target=ask)
    thread.start()
    thread.join()
    assert echo("second\n") == "second\n"
    started[0].communicate()
    assert started[0].returncode == 0


def test_a_child_whose_parent_has_died_before_it_asked_ends_at_once() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: gone.pid)
        assert subprocesses.start(["sleep", "1000"]).wait(DEADLINE_S) == 128 + signal.SIGKILL
    environment = {**os.environ, subprocesses.LAUNCHER: str(gone.pid)}
    command = [sys.executable, "-m", "captionscale", "config"]
    assert subprocess.run(command, env=environment, check=False).returncode == 128 + signal.SIGKILL
    environment[subprocesses.LAUNCHER] = str(os.getpid())
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 0


def test_a_program_that_is_not_there_or_cannot_run_is_told(tmp_path, capfd) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        subprocesses.start([tmp_path / "no-such-program"])
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    assert subprocesses.run([broken]).returncode == 1
    assert capfd.readouterr().err == f"{broken}: Exec format error\n"


RANK = """
import os, subprocess, sys
from captionscale.subprocesses import LAUNCHER
os.environ[LAUNCHER] = str(os.getpid())
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
subprocess.Popen([sys.executable, "-m", "captionscale", *sys.argv[1:]]).wait()
"""


def test_a_rank_that_waits_for_its_peers_ends_with_its_launcher(packed, tmp_path, marked) -> None:
    tiny_config(tmp_path, packed)
    process = start("-c", RANK, "train", str(tmp_path / "experiment.toml"), "--out", str(tmp_path / "run"))

    def waits() -> bool:
        # It is the store that its peers would meet at.
        ranks = [each for each in marked() if each.pid != process.pid]
        return any(it.status == psutil.CONN_LISTEN for each in ranks for it in each.net_connections())

    wait_for(waits)
    expect_no_survivor(process, marked)


def test_a_launcher_that_is_killed_leaves_no_rank_and_no_scorer_and_the_run_can_be_resumed(
    packed, tmp_path, marked
) -> None:
    changes = ("train.epochs=4", "train.save_every=2")
    settings = tiny_config(tmp_path, packed, *changes)
    loop.train(settings, tmp_path / "alone")
    run, experiment = tmp_path / "run", str(tmp_path / "experiment.toml")
    command = ["launch", "--processes", "2", "--", "train", experiment, "--out", str(run)]
    process = start("-m", "captionscale", *command)
    wait_for(lambda: process.poll() is not None or (run / "validation").is_dir())
    # Launcher, two ranks and perhaps the scorer.
    assert len(marked()) >= 3
    expect_no_survivor(process, marked)
    loop.train(settings, run)
    assert logged_losses(run) == [
        (step, pytest.approx(loss, abs=1e-5)) for step, loss in logged_losses(tmp_path / "alone")
    ]
    assert max_abs_difference(load_weights(run), load_weights(tmp_path / "alone")) < 1e-5


POOL = """
import multiprocessing, signal, sys
from concurrent.futures import ProcessPoolExecutor
from captionscale.data.pack_workers import _start
if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("forkserver"), _start, (False,))
    for _ in range(2):
        pool.submit(signal.pause)
    sys.stdin.read()
"""


def test_workers_of_pack_end_with_it(tmp_path, marked) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL, encoding="utf-8")
    process = start(script)
    # The fork server, two workers, and what tracks their resources.
    wait_for(lambda: len(marked()) == 5)
    expect_no_survivor(process, marked)


def test_all_processes_are_started_by_one_module_or_have_a_deadline() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
                bounded = any(keyword.arg == "timeout" for keyword in node.keywords)
                if name in ("subprocess.run", "subprocess.Popen", "os.system", "os.fork") and not bounded:
                    found.append((str(path.relative_to(PACKAGE)), name))
    # What sbatch has begun it is to end: the job would be there without its number being told.
    assert set(found) == {("subprocesses.py", "subprocess.Popen"), ("tools/submit.py", "subprocess.run")}
