"""Score captions beside other work, in a process of its own that is handed them and asked later."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

from captionscale import subprocesses
from captionscale.errors import UserError
from captionscale.files import temp_folder
from captionscale.progress import say
from captionscale.score.java import JavaProcessError
from captionscale.score.metrics import Evaluator

_TRIES = 3
"""Memory may be short for a moment, and a run that lost scores could choose another best checkpoint."""


class BackgroundScorer:
    """Scores one set of captions at a time against the same references.

    A process that is killed at it is replaced, and scores the same captions again.
    The process starts with the first captions and keeps its JVMs and tokenized references for the next ones.
    It ends with this one, however that ends.
    """

    def __init__(self, references: Mapping[int, Sequence[str]], metrics: Sequence[str]):
        """Take what all captions are scored by.

        Args:
            references: The human captions of each image.
            metrics: Some of `metrics.METRICS`.
        """
        self._task = json.dumps({"references": list(references.items()), "metrics": list(metrics)})
        # The process is killed at its work, and then puts nothing away.
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(temp_folder("scores"))
        self._thread = ThreadPoolExecutor(1, "scores")
        self._process: subprocess.Popen[str] | None = None
        self._asked: Future[dict[str, float]] | None = None
        self._closed = False

    def submit(self, captions: Mapping[int, str]) -> None:
        """Hand over captions, one for each image, and do not wait."""
        self._asked = self._thread.submit(self._ask, json.dumps(list(captions.items())))

    def result(self, timeout_s: float = 0) -> dict[str, float] | None:
        """Return the scores of the captions that were handed over last; none if it is still at them.

        Args:
            timeout_s: How long to wait for them.

        Raises:
            UserError: They could not be scored, or the process died each time that this was tried.
        """
        assert self._asked is not None, "no captions were handed over"
        try:
            return self._asked.result(timeout_s)
        except TimeoutError:
            return None

    def close(self) -> None:
        """End the process, at whatever it is."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        self._thread.shutdown()
        self._end()
        self._stack.close()

    def _ask(self, captions: str) -> dict[str, float]:
        for tries_left in reversed(range(_TRIES)):
            reply = self._reply(captions)
            if "scores" in reply:
                scores: dict[str, float] = reply["scores"]
                return scores
            if not reply["died"] or self._closed or not tries_left:
                break
            say(f"warning: {reply['error']}; scoring the same captions again")
        raise UserError(reply["error"])

    def _reply(self, captions: str) -> dict[str, Any]:
        """Return scores, or an error and whether a process died, which another one may not."""
        try:
            answer = self._answer(captions)
        except BrokenPipeError:
            answer = ""
        except OSError as error:
            return _died(
                f"scoring: its process does not start ({error}), mostly for want of memory; give the job more"
            )
        if answer.endswith("\n"):
            reply: dict[str, Any] = json.loads(answer)
            return reply
        return _died(
            f"scoring: its process ended with exit code {self._end()} before it had scored, mostly for want"
            " of memory; give the job more of it"
        )

    def _answer(self, captions: str) -> str:
        if (process := self._process) is None:
            process = self._process = self._start()
            if self._closed:
                process.kill()
            print(self._task, file=process.stdin)
        assert process.stdout is not None
        print(captions, file=process.stdin, flush=True)
        return process.stdout.readline()

    def _end(self) -> int | None:
        """Wait until the process has ended; the next captions get another one."""
        process, self._process = self._process, None
        if process is None:
            return None
        # Closing sends what is still buffered, and nobody may be there to read it.
        with suppress(BrokenPipeError), process:
            pass
        return process.wait()

    def _start(self) -> "subprocess.Popen[str]":
        return subprocesses.start_module(
            __name__,
            env={"TMPDIR": str(self._folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )


def _died(error: str) -> dict[str, Any]:
    return {"error": error, "died": True}


def _serve() -> None:
    """Answer lines of captions with lines of scores, until there are no more."""
    answers = subprocesses.serve()
    # Training comes first.
    os.nice(10)
    task = json.loads(sys.stdin.readline())
    references = dict(task["references"])
    with Evaluator() as evaluator:
        for line in sys.stdin:
            reply: dict[str, object]
            try:
                scores = evaluator.measure(dict(json.loads(line)), references, task["metrics"])
                reply = {"scores": scores.values}
            except UserError as error:
                reply = {"error": str(error), "died": isinstance(error, JavaProcessError)}
            print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
