from pathlib import Path

import numpy as np
import pytest
import torch
from experiment import tiny_config

from captionscale.data.loader import Batch
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.train.loop import train
from captionscale.train.nan_guard import NanGuard
from captionscale.train.run_folder import checkpoint_steps
from captionscale.train.step import StepResult

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def batch(*image_ids: int) -> Batch:
    count = len(image_ids)
    tokens, image_index = torch.zeros(count, 3, dtype=torch.int64), torch.arange(count)
    return Batch(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), tokens, image_index, [*image_ids])


def test_the_first_step_with_nan_is_reported_with_its_images_at_a_later_check() -> None:
    batches = [(0, batch(1, 2)), (3, batch(391895, 522418)), (6, batch(*range(20)))]
    with Ranks() as ranks:
        nan_guard = NanGuard(ranks, "bf16")
        nan_guard.check()
        nan_guard.record(7, StepResult(GOOD, GOOD, [GOOD, GOOD, GOOD]), batches)
        nan_guard.check()
        nan_guard.record(8, StepResult(GOOD, GOOD, [GOOD, GOOD, GOOD]), batches)
        nan_guard.record(9, StepResult(BAD, BAD, [GOOD, BAD, BAD]), batches)
        nan_guard.record(10, StepResult(BAD, BAD, [BAD, BAD, BAD]), batches)
        with pytest.raises(UserError) as caught:
            nan_guard.check()
    assert str(caught.value).startswith(
        "step 9: loss nan (first in micro-batch 3: images 391895, 522418), gradient norm nan, expected"
    )


@pytest.mark.parametrize(("precision", "refused"), [("fp16", False), ("bf16", True), ("fp32", True)])
def test_a_gradient_may_overflow_in_fp16_alone(precision: str, refused: bool) -> None:
    with Ranks() as ranks:
        nan_guard = NanGuard(ranks, precision)
        nan_guard.record(1, StepResult(GOOD, torch.tensor(np.inf), [GOOD]), [(0, batch(1))])
        if refused:
            with pytest.raises(UserError, match="step 1: loss 1, gradient norm inf"):
                nan_guard.check()
        else:
            nan_guard.check()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(packed: Path, tmp_path: Path) -> None:
    rates = ("train.lr=1e30", "train.encoder_lr=1e30", "train.warmup_ratio=0")
    changes = (*rates, "train.log_every=1000", "train.save_every=1")
    with pytest.raises(UserError, match=r"step 2: loss nan \(first in micro-batch 0: images \d+, \d+"):
        train(tiny_config(tmp_path, packed, *changes), tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [1]
