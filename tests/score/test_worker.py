import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from captionscale.errors import UserError
from captionscale.score.worker import BackgroundScorer

REFERENCES = {7: ["a dog runs", "a brown dog"], 3: ["two cats sleep on a sofa"]}
METRICS = ("BLEU-1", "ROUGE-L")


@pytest.fixture
def scorer() -> Iterator[BackgroundScorer]:
    with closing(BackgroundScorer(REFERENCES, METRICS)) as scorer:
        yield scorer


def children(process: int) -> set[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def result(scorer: BackgroundScorer) -> dict[str, float]:
    deadline = time.monotonic() + 600
    while (scores := scorer.result(0.1)) is None:
        assert time.monotonic() < deadline
    return scores


def test_each_set_of_captions_has_its_own_scores(scorer: BackgroundScorer) -> None:
    scorer.submit({3: "two cats sleep on a sofa", 7: "a dog runs"})
    assert scorer.result() is None, "it was waited for"
    assert result(scorer) == {"BLEU-1": pytest.approx(1), "ROUGE-L": 1}
    scorer.submit({3: "a dog runs", 7: "two cats sleep on a sofa"})
    assert result(scorer)["ROUGE-L"] < 0.3
    assert result(scorer)["ROUGE-L"] < 0.3, "asked twice"
    scorer.submit({3: "a dog runs"})
    with pytest.raises(UserError, match=r"1 image \(7\) without a caption"):
        result(scorer)


def test_signals_do_not_stop_the_scorer(scorer: BackgroundScorer) -> None:
    before = children(os.getpid())
    scorer.submit({3: "a cat", 7: "a dog"})
    first = result(scorer)
    (process,) = children(os.getpid()) - before
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(process, number)
    scorer.submit({3: "a cat", 7: "a dog"})
    assert result(scorer) == first
    assert process in children(os.getpid())


def test_it_ends_with_its_parent_process() -> None:
    code = f"""
from captionscale.score.worker import BackgroundScorer
scorer = BackgroundScorer({REFERENCES!r}, {METRICS!r})
scorer.submit({{3: "a cat", 7: "a dog"}})
while scorer.result(1) is None: pass
print("done", flush=True)
import time; time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        (child,) = children(process.pid)
        process.kill()
    deadline = time.monotonic() + 600
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
