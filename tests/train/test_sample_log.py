import json
from pathlib import Path

import pytest

from captionscale.data.sampler import BatchSampler
from captionscale.distributed.ranks import Ranks
from captionscale.train import sample_log
from captionscale.train.sample_log import SampleLog

SAMPLER = BatchSampler((4, 4), seed=0, global_batch=4, micro_batch=2, shuffle_window=1)
IDS = [100 + item for item in range(8)]
STEPS = 4


def attempt(run: Path, rank: int, steps: range, sampler: BatchSampler = SAMPLER) -> Path:
    """Write the log of the only rank of an attempt, and return its file."""
    run.mkdir(exist_ok=True)
    with Ranks() as ranks:
        ranks.rank = rank
        log = SampleLog(run, ranks)
    for step in steps:
        for number, items in sampler.micro_batches(step, 0, 1):
            log.write(step, number, [IDS[item] for item in items])
    log.close()
    return max((run / "sample_log").iterdir())


def errors(run: Path, steps: int = STEPS) -> list[str]:
    return sample_log.find_errors(sample_log.read(run), SAMPLER, IDS, steps)


def test_repeated_steps_count_once_and_torn_lines_do_not_count(tmp_path: Path) -> None:
    killed = attempt(tmp_path, 0, range(3))
    killed.write_text(killed.read_text() + '{"step": 3, "micro_batch": 0, "image_ids": [10')
    attempt(tmp_path, 0, range(2, STEPS))
    assert errors(tmp_path) == []
    assert errors(tmp_path, 3) == [
        f"step 3: micro-batch {number} was done 1 times, expected 0" for number in (0, 1)
    ]


def test_a_lost_or_repeated_sample_is_reported(tmp_path: Path) -> None:
    log = attempt(tmp_path, 0, range(STEPS))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lost, kept = lines[0]["image_ids"]
    lines[0]["image_ids"] = [kept, kept]
    log.write_text("\n".join(map(json.dumps, lines)))
    assert errors(tmp_path) == [
        f"epoch 0: 1 samples too many, such as {kept}",
        f"epoch 0: 1 samples never, such as {lost}",
    ]


@pytest.mark.parametrize("kept", [slice(1, None), slice(None, -1)])
def test_a_missing_micro_batch_is_reported(tmp_path: Path, kept: slice) -> None:
    log = attempt(tmp_path, 0, range(STEPS))
    log.write_text("\n".join(log.read_text().splitlines()[kept]) + "\n")
    assert "was done 0 times, expected 1" in errors(tmp_path)[0]


def test_a_micro_batch_of_two_ranks_is_reported(tmp_path: Path) -> None:
    log = attempt(tmp_path, 0, range(STEPS))
    log.with_name("attempt-00001.rank-00001.jsonl").write_text(log.read_text().splitlines()[0] + "\n")
    assert "step 0: micro-batch 0 was done 2 times, expected 1" in errors(tmp_path)
