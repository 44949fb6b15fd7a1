"""The sample log: which images really went through the model, at which step, in which micro-batch.

`sample_log/attempt-00002.rank-00001.jsonl` has a line for each micro-batch that this rank did after the run's
second start. A killed run does its last steps again: what the latest attempt that did a step wrote of it is
what led to the weights.
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
"""By step and number of the micro-batch: the image ids that each rank which did it has written down."""


class _Line(msgspec.Struct, frozen=True, gc=False):
    """A micro-batch that was done."""

    step: Step
    micro_batch: int
    image_ids: list[int]


_LINE = msgspec.json.Decoder(_Line)


class SampleLog:
    """What one rank writes, from one start of the run to its end or its death."""

    def __init__(self, run: Path, ranks: Ranks):
        """Begin an attempt; all ranks call it."""
        attempt = ranks.run_on_main(_next_attempt, run)
        path = run / "sample_log" / f"attempt-{attempt:05d}.rank-{ranks.rank:05d}.jsonl"
        # A line leaves the process at once, so that a killed one has written all it did.
        self._file = path.open("x", encoding="utf-8", buffering=1)

    def write(self, step: int, number: int, image_ids: list[int]) -> None:
        """Add a micro-batch that has gone forward and backward, before the step is taken."""
        self._file.write(json.dumps({"step": step, "micro_batch": number, "image_ids": image_ids}) + "\n")

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()


def read(run: Path) -> History:
    """Return what led to a run's weights; what a killed start of it did in vain is left out.

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
    """Return what contradicts that a run learnt from each sample of each epoch exactly once; nothing: proven.

    Args:
        history: As `read` gives it.
        sampler: Says how many micro-batches a step has and where epochs end; it is not asked what they hold.
        image_ids: Of the train split.
        steps: That the run took. In a last epoch that they do not fill, each sample comes at most once.
    """
    wanted = {(step, number) for step in range(steps) for number in range(sampler.micro_batches_per_step)}
    found = [
        f"step {step}: micro-batch {number} was done {times} times, wanted {int((step, number) in wanted)}"
        for step, number in sorted(wanted | history.keys())
        if (times := len(history.get((step, number), ()))) != ((step, number) in wanted)
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
    """Yield all lines, each with its attempt; damaged ones are named."""
    for path in sorted((run / "sample_log").iterdir()):
        if name := _NAME.fullmatch(path.name):
            try:
                data = read_file(path, _MAX_BYTES)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror}), expected what a rank has done; correct its"
                    " rights, or move it away"
                ) from None
            # The last line of a killed process may be torn; its step was not saved.
            found = parsing.read_lines(data, lambda line: parsing.decode(line, _LINE))
            if warning := found.warning(path):
                say(f"warning: {warning}")
            for _, line in found.valid:
                yield int(name[1]), line
