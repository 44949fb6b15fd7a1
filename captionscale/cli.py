"""Entry point: runs a command, and turns errors into one line and an exit code."""

import io
import os
import re
import signal
import sys
from collections.abc import Sequence

from captionscale import credentials
from captionscale.commands.parser import parser
from captionscale.errors import PreemptedError, UserError
from captionscale.escape import for_terminal
from captionscale.subprocesses import end_with_launcher
from captionscale.terminal import make_safe


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error that the user can fix is one line and exit code 1."""
    end_with_launcher()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # A closed stream's descriptor is reused by the next file, which output would then go to.
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Captions may have characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    make_safe()
    # Threads that spin while they wait keep other processes from the cores: with three processes on two cores
    # all took nine times as long, while sleeping costs one that is alone 8 %.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if arguments is None:
        # Jobs, trackers and receipts record the command line.
        sys.argv[1:] = map(credentials.strip_and_remember, sys.argv[1:])
        arguments = sys.argv[1:]
    options = parser().parse_args([credentials.strip_and_remember(each) for each in arguments])
    try:
        options.handler(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, is gone; the interpreter must not flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except UserError as error:
        _fail(*map(str, error.args))
    except PreemptedError as error:
        if str(error):
            _fail(f"{error}; run the same command again to resume", code=PreemptedError.EXIT_CODE)
        raise SystemExit(PreemptedError.EXIT_CODE) from None
    except OSError as error:
        _fail(
            f"{error.filename or 'system'}: {error.strerror or error};"
            " check the path, its rights and the free space"
        )
    except RuntimeError as error:
        if not any(transport in str(error) for transport in ("gloo", "NCCL")):
            raise
        # "[file of gloo's source:line] reason. More, for its authors"
        reason = re.sub(r"^\[[^]]*\] |\. .*", "", str(error).splitlines()[0])
        _fail(f"a rank that this one waited for is gone; see its message, or the launcher's ({reason})")
    except KeyboardInterrupt as stopped:
        kept = "stopped by Ctrl-C; finished work is kept, run the same command again to resume"
        _fail(str(stopped) or kept, code=130)


def _fail(*lines: str, code: int = 1) -> None:
    rank = os.environ.get("RANK", "0")
    text = credentials.strip("\n".join(map(for_terminal, lines)))
    print(f"captionscale: {'' if rank == '0' else f'rank {rank}: '}{text}", file=sys.stderr)
    raise SystemExit(code)
