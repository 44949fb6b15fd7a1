"""The processes of a run, and their collective operations."""

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
    patch_environment,
)
from jaxtyping import Float
from torch import Tensor, nn

from captionscale.errors import UserError
from captionscale.progress import say

T = TypeVar("T")
P = ParamSpec("P")

# What launchers set, as Accelerate reads it.
_ALONE = {
    "LOCAL_RANK": -1,
    "WORLD_SIZE": 1,
    "PMI_SIZE": 1,
    "OMPI_COMM_WORLD_SIZE": 1,
    "MV2_COMM_WORLD_SIZE": 1,
}


class Ranks:
    """This process and its peers, as started by `accelerate launch`; one rank without a launcher."""

    def __init__(self, precision: str = "fp32", *, alone: bool = False, cpu: bool = False):
        """Join the process group.

        Args:
            precision: Of the forward pass: `fp32`, `bf16` or `fp16`.
            alone: Ignore the launcher: be the only rank.
            cpu: Use no GPU, as without one or where the launcher asks for CPUs.

        Raises:
            UserError: The device or the engine lacks this precision, or the launch profile asks for another
                stage of ZeRO than 1 or 2.
        """
        self.zero_stage = None if alone else _zero_stage()
        """Of DeepSpeed's ZeRO; None without it."""
        cpu |= os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        cpu |= not torch.cuda.is_available()
        if precision == "fp16" and cpu:
            raise UserError(
                "train.precision = fp16 needs a GPU, found a CPU; set train.precision to fp32, or to bf16"
            )
        if precision == "fp16" and self.zero_stage is not None:
            raise UserError(
                "train.precision = fp16 has no loss scaling under ZeRO; set train.precision to bf16 or fp32,"
                " or take --profile gpu"
            )
        # Ranks wait while rank 0 scores: COCO's val2014 can take half an hour.
        process_group = InitProcessGroupKwargs(timeout=timedelta(hours=1))
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        try:
            # Accelerate would start DeepSpeed on GPUs only, with the model itself in half precision.
            with patch_environment(accelerate_use_deepspeed="false", **_ALONE if alone else {}):
                self.accelerator = Accelerator(
                    mixed_precision={"fp32": "no"}.get(precision, precision),
                    cpu=cpu,
                    kwargs_handlers=[process_group, ddp],
                )
        except ValueError as error:
            raise UserError(
                f"train.precision = {precision}: refused by this device ({error}); set train.precision to"
                " fp32"
            ) from None
        self.world_size: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        # Other CPUs emulate it.
        has_bf16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        has_bf16 |= platform.machine() == "aarch64"
        if precision == "bf16" and self.device.type == "cpu" and self.rank == 0 and not has_bf16:
            say(
                "warning: this CPU has no bf16 instructions, so train.precision = bf16 is many times slower"
                " than fp32; set train.precision to fp32"
            )
        self._all_fail = False

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A rank that fails alone must not wait for peers that wait elsewhere.
        if error is None or self.world_size == 1 or self._all_fail:
            # The launcher kills all ranks when one has failed, and rank 0 may still write.
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
            # This process may join again in another precision.
            AcceleratorState._reset_state(reset_partial_state=True)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass in the run's precision."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def seed(self, *key: int) -> None:
        """Seed torch with a hash of these integers."""
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
        # torch.manual_seed looks for every kind of device, which takes half a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def sum(self, *values: Tensor | int | float) -> Float[Tensor, "values"]:
        """Return the sums of scalars over all ranks, in double precision, on the device."""
        scalars = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        total = torch.stack(scalars)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all ranks, in the order of the ranks."""
        if self.world_size == 1:
            return items
        return gather_object(items)  # type: ignore[no-any-return]

    def run_on_main(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on rank 0, and return its result on every rank.

        An error ends the other ranks too; rank 0 alone reports it.
        """
        result: Any = None
        failure = None
        if self.is_main:
            try:
                result = action(*args, **kwargs)
            except Exception as error:
                failure = error
        outcome = [result, failure is not None]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(outcome, device=self.device)
        result, self._all_fail = outcome
        if failure is not None:
            raise failure
        if self._all_fail:
            raise SystemExit(1)
        return result  # type: ignore[no-any-return]

    def broadcast_buffers_from_main(self, model: nn.Module) -> None:
        """Broadcast the buffers of rank 0, such as batch statistics."""
        if self.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)


def _zero_stage() -> int | None:
    """Return the ZeRO stage of the launch profile; None without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
    if stage not in ("1", "2"):
        raise UserError(
            f"launch profile: deepspeed_config.zero_stage is {stage}, expected 1 or 2, as in"
            " launch/zero2.yaml; change it"
        )
    return int(stage)
