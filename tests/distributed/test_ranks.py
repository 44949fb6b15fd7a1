import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch
from experiment import join_all, spawn_ranks
from torch import nn

from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError


def test_random_numbers_depend_on_the_seed_key_only() -> None:
    with Ranks() as ranks:
        ranks.seed(0, 5, 2)
        first = torch.rand(3)
        torch.rand(100)
        ranks.seed(0, 5, 2)
        assert torch.equal(torch.rand(3), first)
        for other in ((0, 2, 5), (5, 0, 2), (0, 5, 3), (1, 5, 2)):
            ranks.seed(*other)
            assert not torch.equal(torch.rand(3), first)


def test_one_process_is_the_only_rank() -> None:
    with Ranks() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
        assert ranks.sum(1, torch.tensor(2.5)).tolist() == [1, 2.5]
        assert ranks.gather([1, 2]) == [1, 2]
        assert ranks.run_on_main(max, 3, 4) == 4


def test_an_error_of_rank_0_is_raised_unchanged() -> None:
    def fail() -> None:
        raise UserError("place: found; expected; cure")

    with Ranks() as ranks, pytest.raises(UserError, match="place: found"):
        ranks.run_on_main(fail)


def _fail_together(folder: Path) -> None:
    def fail() -> None:
        raise UserError("place: found; expected; cure")

    with suppress(UserError, SystemExit), Ranks() as ranks, ExitStack() as stack:
        if ranks.is_main:
            stack.callback(time.sleep, 1)
        ranks.run_on_main(fail)
    (folder / str(ranks.rank)).write_text(str(time.time()))


def test_when_all_ranks_fail_they_wait_for_rank_0(tmp_path: Path) -> None:
    # The launcher kills rank 0 when another rank exits, perhaps before it has saved and reported the error.
    join_all(spawn_ranks(2, _fail_together, tmp_path))
    first, second = (float((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert second > first - 0.5


def test_a_process_may_change_its_precision() -> None:
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with Ranks(precision) as ranks, ranks.autocast():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == kind


@pytest.mark.parametrize(("precision", "warned"), [("bf16", True), ("fp32", False)])
def test_bf16_on_a_cpu_without_bf16_instructions_is_a_warning(precision, warned, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with Ranks(precision):
        assert ("set train.precision to fp32" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("stage", "precision", "message"),
    [
        ("3", "fp32", "zero_stage is 3, expected 1 or 2, as in launch/zero2.yaml; change it"),
        ("2", "fp16", "fp16 .*; set train.precision to "),
    ],
)
def test_unsupported_zero_settings_are_refused(stage, precision, message, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    with pytest.raises(UserError, match=message):
        Ranks(precision)
