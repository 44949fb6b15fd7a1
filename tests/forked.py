"""Programs forked from a server that has imported what takes each of them seconds, torch above all.

The fixture `forked` has `subprocess` do so with all Python programs of this process, whose first word is
`sys.executable`. They have parent, session, streams, environment, folder, arguments and exit code as if they
were started; but /proc shows the environment of the server, and the command line as far as there is room.
A launcher among them forks its ranks.
A test of the start itself, of imports or of /proc uses the fixture `started`.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

IMPORTED = (
    "accelerate.commands.launch",
    "captionscale.score",
    "captionscale.tools.scoring",
    "captionscale.train.loop",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)
READ_AT_START = ("HF_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "OMP_NUM", "OPENBLAS_", "PYTHON")
"""Beginnings of names of variables that Python, libc or an imported module reads once."""
_PR_SET_CHILD_SUBREAPER = 36
_LOCK = threading.Lock()
_KEPT: list[Any] = []
"""Streams of the process that a program was forked from, which may hold text."""
_start = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_installed: list[str] | None = None
"""Where modules lie without PYTHONPATH; None in a process that may have threads, and so has a server."""


@contextmanager
def programs(*, forked: bool = True) -> Iterator[None]:
    """Have `subprocess` fork them where that makes no difference, or start them, in this context."""
    before = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    subprocess.Popen._execute_child = start if forked else _start  # type: ignore[attr-defined]
    try:
        yield
    finally:
        subprocess.Popen._execute_child = before  # type: ignore[attr-defined]


def start(self: Any, *arguments: Any) -> None:
    """Take the place of `subprocess.Popen._execute_child`."""
    given = inspect.signature(_start).bind(self, *arguments).arguments
    words = [given["args"]] if isinstance(given["args"], str) else [os.fspath(it) for it in given["args"]]
    environment = dict(os.environ if given["env"] is None else given["env"])
    # A launcher's threads only copy what its ranks print.
    alone = threading.active_count() == 1 or words[1:4] == ["-u", "-m", "captionscale"]
    if not (alone or _installed is None) or not _can_fork(words, given, environment):
        _start(self, *arguments)
        return
    request = {
        "words": words[1:],
        "environment": environment,
        "folder": os.fspath(given["cwd"] or Path.cwd()),
        "session": given["start_new_session"],
        "group": given["process_group"],
    }
    ends = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
    streams = [number if given == -1 else given for number, given in enumerate((ends[0], ends[3], ends[5]))]
    try:
        self.pid = _ask(request, streams) if _installed is None else _fork(request, streams)
    finally:
        self._close_pipe_fds(*ends)
    self._child_created = True


def _can_fork(words: list[str], given: dict[str, Any], environment: dict[str, str]) -> bool:
    """Whether nothing is asked for that only a new process can give."""
    options = {"preexec_fn": None, "close_fds": True, "startupinfo": None, "shell": False}
    options |= {"restore_signals": True, "gid": None, "gids": None, "uid": None, "umask": -1}
    return (
        words[0] == sys.executable
        and given["executable"] in (None, words[0])
        and _program(words[1:]) is not None
        and not given["pass_fds"]
        and all(given[name] == value for name, value in options.items())
        and all(
            environment.get(name) == os.environ.get(name)
            for name in {*environment, *os.environ} - {"PYTHONPATH"}
            if name.startswith(READ_AT_START)
        )
    )


def _program(words: list[str]) -> list[str] | None:
    """Return what follows Python's options, if they are known here."""
    match words:
        case ["-u" | "-P", *program]:
            return _program(program)
        case ["-I", "-S", file, _, python, *program] if file.endswith("captionscale/subprocesses.py"):
            return _program(program) if python == sys.executable else None
        case ["-m" | "-c", _, *_]:
            return words
        case [file, *_] if not file.startswith("-"):
            return words
    return None


def _ask(request: dict[str, Any], streams: list[int]) -> int:
    """Have the server fork a program, which becomes a child of this process; return its process id."""
    server = _server(os.getpid())
    data = pickle.dumps(request)
    with _LOCK:
        # Its parent is forked by the server, and ends at once.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(server, [len(data).to_bytes(8, "big")], streams)
            server.sendall(data)
            answer = server.recv(8, socket.MSG_WAITALL)
        finally:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert len(answer) == 8, "the fork server has died"
    return int.from_bytes(answer, "big")


@cache
def _server(_: int) -> socket.socket:
    """Start the server of a process; it ends when the socket closes."""
    ours, its = socket.socketpair()
    with its:
        # The last word is room for the command lines of programs.
        command = [sys.executable, __file__, str(its.fileno()), " " * 5_000]
        process = subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def prepare() -> None:
    """Have this process fork the programs that it starts."""
    global _installed
    for name in IMPORTED:
        importlib.import_module(name)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    _installed = [path for path in sys.path[1:] if path not in paths]
    subprocess.Popen._execute_child = start  # type: ignore[attr-defined]


def _serve(connection: socket.socket) -> None:
    """Fork a program for each request."""
    prepare()
    # A fork of several threads would have one, and the locks of all.
    assert len(list(Path("/proc/self/task").iterdir())) == 1
    gc.collect()
    gc.freeze()
    while True:
        size, streams, _, _ = socket.recv_fds(connection, 8, 3, socket.MSG_WAITALL)
        if not size:
            os._exit(0)
        request = pickle.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        reading, writing = os.pipe()
        between = os.fork()
        if not between:
            between = os.getpid()
            program = _fork(request, streams, between)
            os.write(writing, program.to_bytes(8, "big"))
            os._exit(0)
        os.close(writing)
        for stream in streams:
            os.close(stream)
        answer = os.read(reading, 8)
        os.close(reading)
        os.waitpid(between, 0)
        if len(answer) != 8:
            sys.exit("the fork server could not fork")
        connection.sendall(answer)


def _fork(request: dict[str, Any], streams: list[int], between: int | None = None) -> int:
    """Fork a program; return its process id.

    Args:
        request: Of `start`.
        streams: Its three, of this process.
        between: Parent that ends before it begins.
    """
    if program := os.fork():
        return program
    try:
        while os.getppid() == between:
            time.sleep(0.001)
        _become(request, streams)
        code = _run(request["words"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # As Python ends, but for what it does with memory.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Give this process what a new one would have."""
    copies = [fcntl.fcntl(stream, fcntl.F_DUPFD, 3) for stream in streams]
    for number, copy in enumerate(copies):
        os.dup2(copy, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if request["session"]:
        os.setsid()
    if request["group"] != -1:
        os.setpgid(0, request["group"])
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, own)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, f"__{name}__")
        _KEPT.append(old)
        new = open(number, old.mode, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        if number:
            unbuffered = "-u" in request["words"][:1]
            new.reconfigure(line_buffering=number == 2 or new.isatty(), write_through=unbuffered)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    tempfile.tempdir = None
    importlib.invalidate_caches()
    assert _installed is not None
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *_installed]


def _show(command: list[str]) -> None:
    """Have /proc show a command line as that of this process."""
    # Fields 48 and 49, of which the third follows the name.
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    text = "\0".join(command).encode()[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _run(words: list[str]) -> int:
    """Run a program; return its exit code."""
    if words[:2] == ["-I", "-S"]:
        from captionscale import subprocesses

        subprocesses._end_with(int(words[3]))
        words = words[5:]
    _show([sys.executable, *words])
    program = _program(words)
    assert program is not None
    try:
        match program:
            case ["-m", name, *arguments]:
                sys.argv = ["-m", *arguments]
                if "-P" not in words[:1]:
                    sys.path.insert(0, str(Path.cwd()))
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            case ["-c", code, *arguments]:
                sys.argv = ["-c", *arguments]
                sys.path.insert(0, "")
                main = sys.modules["__main__"] = types.ModuleType("__main__")
                exec(compile(code, "<string>", "exec"), vars(main))
            case [file, *_]:
                sys.argv = program
                sys.path.insert(0, str(Path(file).resolve().parent))
                runpy.run_path(file, run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
