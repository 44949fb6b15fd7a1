"""The way in. Each command imports what it needs, so that `--help` is instant."""

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
            # Its number would go to the next file that is opened, and what we say into that file.
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Captions hold any letter, also where the terminal does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    make_safe()
    # Threads that spin while they wait keep other processes from the cores: with three processes on two cores
    # all took nine times as long, while sleeping costs one that is alone 8 %.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if arguments is None:
        # Jobs, trackers and receipts say by which command they were made.
        sys.argv[1:] = map(credentials.strip_and_remember, sys.argv[1:])
        arguments = sys.argv[1:]
    options = parser().parse_args([credentials.strip_and_remember(each) for each in arguments])
    try:
        options.handler(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough, as `head` does; nor can the interpreter flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except UserError as error:
        _fail(*map(str, error.args))
    except PreemptedError as error:
        if str(error):
            _fail(f"{error}; the same command goes on", code=PreemptedError.EXIT_CODE)
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
        _fail(f"a rank that this one waited for is gone; it, or its launcher, tells why ({reason})")
    except KeyboardInterrupt as stopped:
        kept = "stopped by Ctrl-C; what was finished is kept, and the same command goes on from there"
        _fail(str(stopped) or kept, code=130)


def _fail(*lines: str, code: int = 1) -> None:
    rank = os.environ.get("RANK", "0")
    text = credentials.strip("\n".join(map(for_terminal, lines)))
    print(f"captionscale: {'' if rank == '0' else f'rank {rank}: '}{text}", file=sys.stderr)
    raise SystemExit(code)
