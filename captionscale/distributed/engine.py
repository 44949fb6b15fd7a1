"""What moves a model: the engine that the launch profile names, behind one set of calls."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError

T = TypeVar("T")

MOMENTS = ("exp_avg", "exp_avg_sq")

# Numbers that travel together under ZeRO. DeepSpeed's own 500 million would take 2 GB of every GPU.
_BUCKET_ELEMENTS = 2**24


def create_engine(
    ranks: Ranks,
    model: nn.Module,
    optimizer: Optimizer,
    clip_norm: float,
    *,
    compress_gradients: bool = False,
) -> "Engine":
    """Hand a model over to the engine that the launch profile names; the arguments are `Engine`'s.

    Raises:
        UserError: It is not installed.
    """
    # On one rank there is nothing to divide.
    kind = Engine if ranks.zero_stage is None or ranks.world_size == 1 else ZeroEngine
    return kind(ranks, model, optimizer, clip_norm, compress_gradients=compress_gradients)


class Engine:
    """A model and its AdamW, as one process or DDP moves them."""

    def __init__(
        self,
        ranks: Ranks,
        model: nn.Module,
        optimizer: Optimizer,
        clip_norm: float,
        *,
        compress_gradients: bool = False,
    ):
        """Hand a model over; the model itself stays what is read, saved and scored.

        Args:
            ranks: Among which gradients are averaged.
            model: On the ranks' device, the same on all of them.
            optimizer: AdamW over what learns.
            clip_norm: Greatest norm of a step's gradient.
            compress_gradients: Whether gradients travel in bf16.
        """
        self.ranks, self._module, self._clip_norm = ranks, model, clip_norm
        self._accelerator = ranks.accelerator
        self._adamw, self._compress = optimizer, compress_gradients
        self._model: Any
        self._optimizer: Any
        self._prepare(compress_gradients)
        ranks.broadcast_buffers_from_main(model)

    def replace_optimizer(self, optimizer: Optimizer) -> None:
        """Move what learns from now on; what the optimiser before knows of it stays known.

        All ranks call it, between two steps.

        Args:
            optimizer: AdamW over that.
        """
        memory = self.optimizer_state()
        self._release()
        self._adamw = optimizer
        self._prepare(self._compress)
        self.load_optimizer_state(memory)

    def _release(self) -> None:
        # DDP takes its hooks off the gradients when nothing refers to it any more.
        self._model = self._optimizer = None
        self._accelerator.free_memory()

    def _prepare(self, compress_gradients: bool) -> None:
        with warnings.catch_warnings():
            # Newer torch wants another word for it, which older torch and Accelerate do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._model, self._optimizer = self._accelerator.prepare(self._module, self._adamw)
        # Not static_graph: it cannot live with no_sync, and gains nothing where each parameter learns.
        if compress_gradients and isinstance(self._model, DistributedDataParallel):
            self._model.register_comm_hook(None, bf16_compress_hook)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's, whose `lr` may be set."""
        return self._adamw.param_groups

    def __call__(self, *inputs: Any) -> Any:
        """Return the model's outputs."""
        return self._model(*inputs)

    def micro_batches(self, work: Iterable[T]) -> Iterator[T]:
        """Yield this rank's micro-batches; gradients travel between ranks only in the last one's backward."""
        items = list(work)
        for number, item in enumerate(items, start=1):
            context = nullcontext() if number == len(items) else self._accelerator.no_sync(self._model)
            with context:
                yield item

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, scaled as the precision needs."""
        self._accelerator.backward(loss)

    def step(self) -> Tensor:
        """Clip the gradient, take the step, and return what the gradient's norm was."""
        norm: Tensor = self._accelerator.clip_grad_norm_(self._module.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return AdamW's memory under the names of the parameters, so that any engine finds it again.

        All ranks call it; what rank 0 gets is whole.
        """
        return {
            f"{name}/{key}": torch.as_tensor(self._adamw.state[parameter][key])
            for name, parameter in self._module.named_parameters()
            if self._adamw.state.get(parameter)
            for key in ("step", *MOMENTS)
        }

    def load_optimizer_state(self, memory: Mapping[str, Tensor]) -> None:
        """Set AdamW's memory to what `optimizer_state` gave, under this or another engine."""
        for name, parameter in self._module.named_parameters():
            # There is none yet if fp16's loss scaler has left out every step so far.
            if f"{name}/step" in memory:
                # In the parameter's own memory format: the fused optimiser goes through both by address.
                moments = {key: torch.empty_like(parameter).copy_(memory[f"{name}/{key}"]) for key in MOMENTS}
                step = memory[f"{name}/step"].to(parameter.device)
                self._adamw.state[parameter] = {"step": step, **moments}

    def scaler_state(self) -> dict[str, int | float]:
        """Return the loss scaler's state; empty unless the precision is fp16."""
        scaler = self._accelerator.scaler
        return dict(scaler.state_dict()) if scaler is not None else {}

    def load_scaler_state(self, state: dict[str, int | float]) -> None:
        """Set the loss scaler's state to one that `scaler_state` gave.

        Raises:
            UserError: It is not one.
        """
        scaler = self._accelerator.scaler
        if not state or scaler is None:
            return
        if missing := scaler.state_dict().keys() - state.keys():
            raise UserError(
                f"checkpoint: the loss scaler's state has no '{min(missing)}', expected that of fp16; take"
                " another checkpoint, or train with the precision that it was saved with"
            )
        scaler.load_state_dict(state)


class ZeroEngine(Engine):
    """The same under DeepSpeed's ZeRO: each rank keeps a part of AdamW's memory, and of the gradients.

    Weights stay whole and in fp32 on each rank, and the precision is that of the other engines: DeepSpeed's
    own bf16 and fp16 would have the model itself in half precision.

    Source:
        Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), stages 0 (none of this, but DeepSpeed's sums of
        gradients), 1 (memory) and 2 (gradients too).
    """

    def _prepare(self, compress_gradients: bool) -> None:
        deepspeed = _deepspeed(self.ranks)
        self._groups = [list(group["params"]) for group in self._adamw.param_groups]
        self._partitioned = bool(self.ranks.zero_stage)
        # Accelerate gives the forward pass its precision, here as under DDP. DeepSpeed sends and flattens
        # parameters as if they were contiguous.
        model = self._accelerator.prepare_model(self._module, evaluation_mode=True)
        model.to(memory_format=torch.contiguous_format)
        settings = {
            # Asked for, and used only in DeepSpeed's own messages.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._clip_norm if self._partitioned else 0.0,
            "communication_data_type": "bf16" if compress_gradients else "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.ranks.zero_stage,
                "reduce_bucket_size": _BUCKET_ELEMENTS,
                "allgather_bucket_size": _BUCKET_ELEMENTS,
            },
        }
        self._model, self._optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=settings
        )
        if self._partitioned:
            # DeepSpeed finds AdamW's memory once it is there, and looks for that of all groups after the
            # first step of the first one.
            for partition in self._partitions():
                moments = {key: torch.zeros_like(partition) for key in MOMENTS}
                self._adamw.state[partition] = {"step": torch.zeros((), device=partition.device), **moments}
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _release(self) -> None:
        self._model.destroy()
        super()._release()

    def _partitions(self) -> list[Tensor]:
        """Return this rank's part of each group of parameters."""
        return [partition for group in self._adamw.param_groups for partition in group["params"]]

    def micro_batches(self, work: Iterable[T]) -> Iterator[T]:
        """Yield this rank's micro-batches, as many as every other rank's."""
        items = list(work)
        for number, item in enumerate(items, start=1):
            self._model.set_gradient_accumulation_boundary(number == len(items))
            yield item

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        self._model.backward(loss)

    def step(self) -> Tensor:
        """Clip the gradient, take the step, and return what the gradient's norm was."""
        if self._partitioned:
            self._model.step()
            return torch.as_tensor(self._model.get_global_grad_norm(), device=self.ranks.device)
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._clip_norm)
        self._model.step()
        return norm

    def optimizer_state(self) -> dict[str, Tensor]:
        """As `Engine.optimizer_state`, gathered from all ranks."""
        if not self._partitioned:
            return super().optimizer_state()
        read = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        # Of each group there is one count of steps.
        return {
            f"{name}/{key}": self._adamw.state[partition]["step"].clone()
            if key == "step"
            else read(parameter, key)
            for partition, names in zip(self._partitions(), self._names(), strict=True)
            for name, parameter in names.items()
            for key in ("step", *MOMENTS)
        }

    def load_optimizer_state(self, memory: Mapping[str, Tensor]) -> None:
        """As `Engine.load_optimizer_state`; each rank takes its part."""
        if not self._partitioned or not memory:
            super().load_optimizer_state(memory)
            return
        write = importlib.import_module("deepspeed.utils").safe_set_full_optimizer_state
        for partition, names in zip(self._partitions(), self._names(), strict=True):
            for name, parameter in names.items():
                # There is none yet of what learns from now on.
                if f"{name}/step" in memory:
                    for key in MOMENTS:
                        write(parameter, memory[f"{name}/{key}"].to(parameter.device), key)
                    self._adamw.state[partition]["step"].copy_(memory[f"{name}/step"])

    def _names(self) -> list[dict[str, Tensor]]:
        """Return the parameters of each group by their names."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [{names[parameter]: parameter for parameter in group} for group in self._groups]


def _deepspeed(ranks: Ranks) -> Any:
    if ranks.device.type == "cpu":
        # Else it takes the GPUs of a machine that has some.
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"the launch profile asks for ZeRO, but DeepSpeed is not there ({error});"
            " pip install 'captionscale[deepspeed]', or take --profile gpu"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Sums in shared memory, for CPUs: compiled by each process at its first run, for no gain here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
