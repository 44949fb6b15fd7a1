"""Child processes that Linux kills when this process dies, however it dies.

`prctl(PR_SET_PDEATHSIG)` reaches a process that imports torch, waits in a collective, holds the GIL or is
stopped. Only the child can ask for it: this file, run as a program, does so and then becomes the command.
"""

import ctypes
import os
import signal
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

LAUNCHER = "CAPTIONSCALE_LAUNCHER"
"""Environment variable with the process id of the launcher, whose ranks torch starts."""
_PR_SET_PDEATHSIG = 1


def start(command: "Sequence[str | Path]", **options: Any) -> "subprocess.Popen[Any]":
    """Start a process that ends when this one does, with the options of `subprocess.Popen`.

    Raises:
        OSError: There is no such program, or no memory for another process.
    """
    import shutil
    import subprocess

    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(2, "No such program", str(command[0]))
    words = [sys.executable, "-I", "-S", __file__, str(os.getpid()), program, *map(str, command[1:])]
    return _starter(os.getpid()).submit(lambda: subprocess.Popen(words, **options)).result()


def run(command: "Sequence[str | Path]") -> "subprocess.CompletedProcess[str]":
    """Run a process to its end, as `start` does, and return its exit code and what it printed."""
    import subprocess

    with start(command, stdout=subprocess.PIPE, text=True) as process:
        printed: str = process.communicate()[0]
    return subprocess.CompletedProcess(command, process.returncode, printed)


def start_module(name: str, *arguments: str, **options: Any) -> "subprocess.Popen[Any]":
    """Start one of our modules as a program, as `start` does, with text streams.

    It imports nothing from the current folder, and has a session of its own: only this process gets Ctrl-C.
    """
    from pathlib import Path

    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    options["env"] = {**os.environ, "PYTHONPATH": paths, **options.get("env", {})}
    command = [sys.executable, "-P", "-m", name, *arguments]
    return start(command, start_new_session=True, text=True, encoding="utf-8", **options)


def kill_tree(process: "subprocess.Popen[Any]") -> None:
    """Kill a process and all its descendants, without waiting."""
    from contextlib import suppress

    import psutil

    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        # It must not start more, or report the end of the others.
        top.suspend()
        for each in (top, *top.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()


def serve() -> TextIO:
    """Prepare a program that `start_module` started; return the stream of its answers.

    SLURM signals every process of a job; this one ignores that, as its parent decides when it ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Other output goes to the standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def end_with_launcher() -> None:
    """If a launcher started this process as a rank, end with it."""
    # Removed: the children of a rank have another parent. The launcher itself may run a command, too.
    launcher = int(os.environ.pop(LAUNCHER, 0))
    if launcher not in (0, os.getpid()):
        _end_with(launcher)


def end_with_pool() -> None:
    """End this worker process with the process that made its pool.

    A thread waits for that, because the worker's parent is the pool's fork server.
    """
    import multiprocessing
    from multiprocessing.connection import wait
    from threading import Thread

    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=follow, daemon=True).start()


@cache
def _starter(_: int) -> "ThreadPoolExecutor":
    """Return the thread that starts this process's children, which are killed when it ends."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1, "starter")


def _end_with(parent: int) -> None:
    """Die with the parent; exit now if it is dead."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    try:
        os.execv(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")
