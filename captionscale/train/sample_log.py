"""The sample log of `drill`: which images went through the model, in which step and micro-batch.

`sample_log/attempt-00002.rank-00001.jsonl` has a line for each micro-batch of rank 1 after the second start.
A killed run repeats its last steps: the latest attempt at a step is what led to the weights.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import msgspec

from captionscale import parsing
from captionscale.data.sampler import BatchSampler
from captionscale.distributed.ranks import Ranks
from captionscale.progress import say
from captionscale.train.log_reader import read_json_lines
from captionscale.train.state import Step

_NAME = re.compile(r"attempt-([0-9]{5,9})\.rank-[0-9]{5,9}\.jsonl")

History = dict[tuple[int, int], list[list[int]]]
"""Lists of image ids, one of each rank that did it, by step and micro-batch."""


class _Line(msgspec.Struct, frozen=True, gc=False):
    """A completed micro-batch."""

    step: Step
    micro_batch: int
    image_ids: list[int]


_LINE = msgspec.json.Decoder(_Line)


class SampleLog:
    """Log of one rank, since a start of the run."""

    def __init__(self, run: Path, ranks: Ranks):
        """Begin an attempt; all ranks call it."""
        attempt = ranks.run_on_main(_next_attempt, run)
        path = run / "sample_log" / f"attempt-{attempt:05d}.rank-{ranks.rank:05d}.jsonl"
        # Line-buffered, so that a killed process has written all that it did.
        self._file = path.open("x", encoding="utf-8", buffering=1)

    def write(self, step: int, number: int, image_ids: list[int]) -> None:
        """Add a micro-batch after its backward pass, before the step."""
        self._file.write(json.dumps({"step": step, "micro_batch": number, "image_ids": image_ids}) + "\n")

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()


def read(run: Path) -> History:
    """Return the history that led to a run's weights, without repeated steps; warn of damaged lines.

    Raises:
        UserError: A file cannot be read.
    """
    lines: list[tuple[int, _Line]] = []
    latest: dict[int, int] = {}
    for path in sorted((run / "sample_log").iterdir()):
        if name := _NAME.fullmatch(path.name):
            # A killed process may leave a torn last line; that step was not saved.
            found = read_json_lines(path, lambda line: parsing.decode(line, _LINE))
            if warning := found.warning(path):
                say(f"warning: {warning}")
            lines += [(int(name[1]), line) for _, line in found.valid]
    for attempt, line in lines:
        latest[line.step] = max(attempt, latest.get(line.step, 0))
    history: History = {}
    for attempt, line in lines:
        if attempt == latest[line.step]:
            history.setdefault((line.step, line.micro_batch), []).append(line.image_ids)
    return history


def find_errors(history: History, sampler: BatchSampler, image_ids: Iterable[int], steps: int) -> list[str]:
    """Return violations of the law that a run of `steps` reads each sample of each epoch exactly once.

    The sampler gives micro-batches per step and the ends of epochs, not their contents.
    """
    expected = {(step, number) for step in range(steps) for number in range(sampler.micro_batches_per_step)}
    found = [
        f"step {step}: micro-batch {number} was done {times} times, expected {(step, number) in expected:d}"
        for step, number in sorted(expected | history.keys())
        if (times := len(history.get((step, number), ()))) != ((step, number) in expected)
    ]
    split = Counter(image_ids)
    epochs: dict[int, Counter[int]] = {}
    for (step, _), logged in history.items():
        epochs.setdefault(sampler.epoch(step), Counter()).update(chain.from_iterable(logged))
    for epoch, seen in sorted(epochs.items()):
        surplus, absent = seen - split, split - seen
        if surplus:
            found.append(f"epoch {epoch}: {surplus.total():,} samples too many, such as {min(surplus)}")
        if absent and (epoch + 1) * sampler.steps_per_epoch <= steps:
            found.append(f"epoch {epoch}: {absent.total():,} samples never, such as {min(absent)}")
    return found


def _next_attempt(run: Path) -> int:
    folder = run / "sample_log"
    folder.mkdir(exist_ok=True)
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return max((int(name[1]) for name in names if name), default=0) + 1
