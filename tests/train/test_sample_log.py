import json
from pathlib import Path

import pytest

from captionscale.data.sampler import BatchSampler
from captionscale.distributed.ranks import Ranks
from captionscale.train import sample_log
from captionscale.train.sample_log import SampleLog

ORDER = BatchSampler((4, 4), seed=0, global_batch=4, micro_batch=2, shuffle_window=1)
IDS = [100 + item for item in range(8)]
STEPS = 4


def attempt(run: Path, rank: int, steps: range, order: BatchSampler = ORDER) -> Path:
    """Write what the only rank of an attempt would, and return its file."""
    run.mkdir(exist_ok=True)
    with Ranks() as ranks:
        ranks.rank = rank
        book = SampleLog(run, ranks)
    for step in steps:
        for number, items in order.micro_batches(step, 0, 1):
            book.write(step, number, [IDS[item] for item in items])
    book.close()
    return max((run / "sample_log").iterdir())


def found(run: Path, steps: int = STEPS) -> list[str]:
    return sample_log.find_errors(sample_log.read(run), ORDER, IDS, steps)


def test_steps_done_again_after_a_kill_count_once_and_a_torn_line_not_at_all(tmp_path: Path) -> None:
    killed = attempt(tmp_path, 0, range(3))
    killed.write_text(killed.read_text() + '{"step": 3, "micro_batch": 0, "image_ids": [10')
    attempt(tmp_path, 0, range(2, STEPS))
    assert found(tmp_path) == []
    assert found(tmp_path, 3) == [
        f"step 3: micro-batch {number} was done 1 times, expected 0" for number in (0, 1)
    ]


def test_a_sample_that_was_lost_or_repeated_is_told(tmp_path: Path) -> None:
    book = attempt(tmp_path, 0, range(STEPS))
    lines = [json.loads(line) for line in book.read_text().splitlines()]
    lost, kept = lines[0]["image_ids"]
    lines[0]["image_ids"] = [kept, kept]
    book.write_text("\n".join(map(json.dumps, lines)))
    assert found(tmp_path) == [
        f"epoch 0: 1 samples too many, such as {kept}",
        f"epoch 0: 1 samples never, such as {lost}",
    ]


@pytest.mark.parametrize("kept", [slice(1, None), slice(None, -1)])
def test_a_micro_batch_that_no_rank_did_is_told(tmp_path: Path, kept: slice) -> None:
    book = attempt(tmp_path, 0, range(STEPS))
    book.write_text("\n".join(book.read_text().splitlines()[kept]) + "\n")
    assert "was done 0 times, expected 1" in found(tmp_path)[0]


def test_a_micro_batch_that_two_ranks_did_is_told(tmp_path: Path) -> None:
    book = attempt(tmp_path, 0, range(STEPS))
    book.with_name("attempt-00001.rank-00001.jsonl").write_text(book.read_text().splitlines()[0] + "\n")
    assert "step 0: micro-batch 0 was done 2 times, expected 1" in found(tmp_path)
