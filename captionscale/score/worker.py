"""Score captions in a background process, in parallel with training."""

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
    """Scores one set of captions at a time against the same references, in a process of its own.

    The process starts with the first captions and keeps its JVMs and tokenized references for the next ones.
    If it is killed, another one scores the same captions again. It ends when this process ends.
    """

    def __init__(self, references: Mapping[int, Sequence[str]], metrics: Sequence[str]):
        """Set the references and metrics of all captions; metrics are names, also of the scores."""
        self._task = json.dumps({"references": list(references.items()), "metrics": list(metrics)})
        # A killed process leaves its temporary files.
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(temp_folder("scores"))
        self._thread = ThreadPoolExecutor(1, "scores")
        self._process: subprocess.Popen[str] | None = None
        self._future: Future[dict[str, float]] | None = None
        self._closed = False

    def submit(self, captions: Mapping[int, str]) -> None:
        """Start scoring captions, one for each image; don't wait."""
        self._future = self._thread.submit(self._score, json.dumps(list(captions.items())))

    def result(self, timeout_s: float = 0) -> dict[str, float] | None:
        """Return the scores of the last captions submitted, or None if they are not ready.

        Args:
            timeout_s: How long to wait.

        Raises:
            UserError: They could not be scored, or the process died at every attempt.
        """
        assert self._future is not None, "no captions were submitted"
        try:
            return self._future.result(timeout_s)
        except TimeoutError:
            return None

    def close(self) -> None:
        """End the process, even at work."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        self._thread.shutdown()
        self._end()
        self._stack.close()

    def _score(self, captions: str) -> dict[str, float]:
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
        """Return scores, or an error and whether the process died, so that another may succeed."""
        answer = ""
        try:
            with suppress(BrokenPipeError):
                answer = self._answer(captions)
        except OSError as error:
            failure = f"scoring: its process does not start ({error}), mostly as memory is short"
        else:
            if answer.endswith("\n"):
                reply: dict[str, Any] = json.loads(answer)
                return reply
            code = self._end()
            failure = (
                f"scoring: its process ended with exit code {code} before it had scored, mostly because"
                " memory is short"
            )
        return {"error": f"{failure}; give the job more", "died": True}

    def _answer(self, captions: str) -> str:
        process = self._process
        if process is None:
            process = self._process = subprocesses.start_module(
                __name__,
                env={"TMPDIR": str(self._folder)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            if self._closed:
                process.kill()
            print(self._task, file=process.stdin)
        assert process.stdout is not None
        print(captions, file=process.stdin, flush=True)
        answer: str = process.stdout.readline()
        return answer

    def _end(self) -> int | None:
        """Wait for the process to end; the next captions start another one."""
        process, self._process = self._process, None
        if process is None:
            return None
        # Closing flushes the buffer to a process that may be dead.
        with suppress(BrokenPipeError), process:
            pass
        return process.wait()


def _serve() -> None:
    """Read captions and write their scores, one line each, until the input ends."""
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
                # By the names that were asked for: a user's own metric was named by its class.
                reply = {"scores": dict(zip(task["metrics"], scores.values.values(), strict=True))}
            except UserError as error:
                reply = {"error": str(error), "died": isinstance(error, JavaProcessError)}
            print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
