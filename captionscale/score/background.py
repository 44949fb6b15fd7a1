"""Score captions beside other work, in a process of its own that is handed them and asked later."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from captionscale.errors import UserError
from captionscale.score.metrics import Evaluator


class BackgroundScorer:
    """Scores one set of captions at a time against the same references.

    The process starts with the first captions and keeps its JVMs and tokenised references for the next ones.
    It ends with this one, however that ends.
    """

    def __init__(self, references: Mapping[int, Sequence[str]], metrics: Sequence[str]):
        """Take what all captions are scored by.

        Args:
            references: The human captions of each image.
            metrics: Some of `metrics.METRICS`.
        """
        self._task = json.dumps({"references": list(references.items()), "metrics": list(metrics)})
        self._thread = ThreadPoolExecutor(1, "scores")
        self._process: subprocess.Popen[str] | None = None
        self._asked: Future[dict[str, float]] | None = None

    def begin(self, captions: Mapping[int, str]) -> None:
        """Hand over captions, one for each image, and do not wait."""
        self._asked = self._thread.submit(self._ask, json.dumps(list(captions.items())))

    def result(self, timeout_s: float = 0) -> dict[str, float] | None:
        """Return the scores of the captions that were handed over last; none if it is still at them.

        Args:
            timeout_s: How long to wait for them.

        Raises:
            UserError: They could not be scored, or the process died.
        """
        assert self._asked is not None, "no captions were handed over"
        try:
            return self._asked.result(timeout_s)
        except TimeoutError:
            return None

    def close(self) -> None:
        """End the process, at whatever it is."""
        if self._process is not None:
            self._process.kill()
        self._thread.shutdown()
        self._end()

    def _ask(self, captions: str) -> dict[str, float]:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(captions, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(
                f"scoring: its process ended with exit code {self._end()} before it had scored, mostly for"
                " want of memory; give the job more of it"
            )
        reply = json.loads(answer)
        if "error" in reply:
            raise UserError(reply["error"])
        scores: dict[str, float] = reply["scores"]
        return scores

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
        # A session of its own: Ctrl-C at the terminal is for training, which may want these scores yet.
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        assert process.stdin is not None
        print(self._task, file=process.stdin, flush=True)
        return process


def _serve() -> None:
    """Answer lines of captions with lines of scores, until there are no more."""
    # SLURM signals every process of a job: it is for training to decide what is left undone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Training comes first.
    os.nice(10)
    task = json.loads(sys.stdin.readline())
    references = dict(task["references"])
    with Evaluator() as evaluator:
        for line in sys.stdin:
            reply: dict[str, object]
            try:
                reply = {
                    "scores": evaluator.measure(dict(json.loads(line)), references, task["metrics"]).values
                }
            except UserError as error:
                reply = {"error": str(error)}
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve()
