"""The sample log of `drill`: which images went through the model, in which step and micro-batch.

`sample_log/attempt-00002.rank-00001.jsonl` has a line for each micro-batch of rank 1 after the second start.
A killed run repeats its last steps: the latest attempt at a step is what led to the weights.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from captionscale import parsing
from captionscale.data.sampler import BatchSampler
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.files import MB, read_file
from captionscale.progress import say
from captionscale.train.state import Step

_NAME = re.compile(r"attempt-([0-9]{5,9})\.rank-[0-9]{5,9}\.jsonl")
_MAX_BYTES = 512 * MB

History = dict[tuple[int, int], list[list[int]]]
"""Lists of image ids, one of each rank that did it, by step and micro-batch."""


class _Line(msgspec.Struct, frozen=True, gc=False):
    """A completed micro-batch."""

    step: Step
    micro_batch: int
    image_ids: list[int]


_LINE = msgspec.json.Decoder(_Line)


class SampleLog:
    """Log of one rank, from a start of the run to its end."""

    def __init__(self, run: Path, ranks: Ranks):
        """Begin an attempt; all ranks call it."""
        attempt = ranks.run_on_main(_next_attempt, run)
        path = run / "sample_log" / f"attempt-{attempt:05d}.rank-{ranks.rank:05d}.jsonl"
        # Line-buffered, so that a killed process has written all it did.
        self._file = path.open("x", encoding="utf-8", buffering=1)

    def write(self, step: int, number: int, image_ids: list[int]) -> None:
        """Add a micro-batch after its backward pass, before the step."""
        self._file.write(json.dumps({"step": step, "micro_batch": number, "image_ids": image_ids}) + "\n")

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()


def read(run: Path) -> History:
    """Return the history that led to a run's weights, without repeated steps.

    Raises:
        UserError: A file cannot be read.
    """
    lines = [*_lines(run)]
    latest: dict[int, int] = {}
    for attempt, line in lines:
        latest[line.step] = max(attempt, latest.get(line.step, 0))
    history: History = {}
    for attempt, line in lines:
        if attempt == latest[line.step]:
            history.setdefault((line.step, line.micro_batch), []).append(line.image_ids)
    return history


def find_errors(history: History, sampler: BatchSampler, image_ids: Iterable[int], steps: int) -> list[str]:
    """Return violations of the law that a run reads each sample of each epoch exactly once.

    Args:
        history: As `read` returns it.
        sampler: Gives micro-batches per step and the ends of epochs, not their contents.
        image_ids: Of the train split.
        steps: Of the run. In an incomplete last epoch each sample comes at most once.
    """
    expected = {(step, number) for step in range(steps) for number in range(sampler.micro_batches_per_step)}
    found = [
        f"step {step}: micro-batch {number} was done {times} times, expected {(step, number) in expected:d}"
        for step, number in sorted(expected | history.keys())
        if (times := len(history.get((step, number), ()))) != ((step, number) in expected)
    ]
    split = Counter(image_ids)
    epochs: dict[int, Counter[int]] = {}
    for (step, _), dones in history.items():
        epochs.setdefault(sampler.epoch(step), Counter()).update(
            image_id for ids in dones for image_id in ids
        )
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


def _lines(run: Path) -> Iterator[tuple[int, _Line]]:
    """Yield all lines with their attempts; warn of damaged ones."""
    for path in sorted((run / "sample_log").iterdir()):
        if name := _NAME.fullmatch(path.name):
            try:
                data = read_file(path, _MAX_BYTES)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror}), expected lines of a rank; correct its"
                    " permissions, or move it away"
                ) from None
            # A killed process may leave a torn last line; that step was not saved.
            found = parsing.read_lines(data, lambda line: parsing.decode(line, _LINE))
            if warning := found.warning(path):
                say(f"warning: {warning}")
            for _, line in found.valid:
                yield int(name[1]), line
