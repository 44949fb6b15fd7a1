"""Model and optimizer in one process, under DDP or under DeepSpeed's ZeRO, with one interface."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
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

# ZeRO bucket size in elements. DeepSpeed's default of 500 million would take 2 GB of every GPU.
_BUCKET_ELEMENTS = 2**24


def create_engine(
    ranks: Ranks,
    model: nn.Module,
    optimizer: Optimizer,
    clip_norm: float,
    *,
    compress_gradients: bool = False,
) -> "Engine":
    """Return the engine of the launch profile; arguments as of `Engine`.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    # One rank has nothing to partition.
    kind = Engine if ranks.zero_stage is None or ranks.world_size == 1 else ZeroEngine
    return kind(ranks, model, optimizer, clip_norm, compress_gradients=compress_gradients)


class Engine:
    """Model and AdamW in one process or under DDP."""

    def __init__(
        self,
        ranks: Ranks,
        model: nn.Module,
        optimizer: Optimizer,
        clip_norm: float,
        *,
        compress_gradients: bool = False,
    ):
        """Wrap a model with equal weights on all ranks; read, save and score the model itself.

        Args:
            ranks: This process and its peers.
            model: On the ranks' device.
            optimizer: AdamW over the trainable parameters.
            clip_norm: Maximum norm of the gradient.
            compress_gradients: Whether to reduce gradients in bf16.
        """
        self.ranks, self._module, self._adamw = ranks, model, optimizer
        self._clip_norm, self._compress_gradients = clip_norm, compress_gradients
        self._accelerator = ranks.accelerator
        self._model: Any
        self._optimizer: Any
        self._prepare()
        ranks.broadcast_buffers_from_main(model)

    def replace_optimizer(self, optimizer: Optimizer) -> None:
        """Train the parameters of another optimizer, keeping the state of those trained before.

        All ranks call it, between two steps.
        """
        state = self.optimizer_state()
        self._release()
        self._adamw = optimizer
        self._prepare()
        self.load_optimizer_state(state)

    def _release(self) -> None:
        # DDP removes its gradient hooks when nothing refers to it.
        self._model = self._optimizer = None
        self._accelerator.free_memory()

    def _prepare(self) -> None:
        with warnings.catch_warnings():
            # Older torch and Accelerate do not know the new name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._model, self._optimizer = self._accelerator.prepare(self._module, self._adamw)
        # No static_graph: it excludes no_sync, and gains nothing where all parameters have gradients.
        if self._compress_gradients and isinstance(self._model, DistributedDataParallel):
            self._model.register_comm_hook(None, bf16_compress_hook)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer; `lr` may be set."""
        return self._adamw.param_groups

    def __call__(self, *inputs: Any) -> Any:
        """Return the model's outputs."""
        return self._model(*inputs)

    def micro_batches(self, work: Iterable[T]) -> Iterator[T]:
        """Yield this rank's micro-batches; gradients are reduced in the backward pass of the last one."""
        items = list(work)
        for number, item in enumerate(items, start=1):
            with self._gradient_sync(number == len(items)):
                yield item

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._accelerator.no_sync(self._model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, scaled as the precision requires."""
        self._accelerator.backward(loss)

    def step(self) -> Tensor:
        """Clip the gradient, take the step, and return the norm before clipping."""
        norm: Tensor = self._accelerator.clip_grad_norm_(self._module.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return AdamW's state by parameter name, for any engine; all ranks call it, rank 0 gets all."""
        return {
            f"{name}/{key}": torch.as_tensor(self._adamw.state[parameter][key])
            for name, parameter in self._module.named_parameters()
            if self._adamw.state.get(parameter)
            for key in ("step", *MOMENTS)
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `optimizer_state` returned, under this or another engine."""
        for name, parameter in self._module.named_parameters():
            # Absent if fp16's loss scaler has skipped every step so far.
            if f"{name}/step" in state:
                # In the parameter's memory format: the fused optimizer reads both by address.
                moments = {key: torch.empty_like(parameter).copy_(state[f"{name}/{key}"]) for key in MOMENTS}
                step = state[f"{name}/step"].to(parameter.device)
                self._adamw.state[parameter] = {"step": step, **moments}

    def scaler_state(self) -> dict[str, int | float]:
        """Return the loss scaler's state; empty unless the precision is fp16."""
        scaler = self._accelerator.scaler
        return dict(scaler.state_dict()) if scaler is not None else {}

    def load_scaler_state(self, state: dict[str, int | float]) -> None:
        """Load what `scaler_state` returned.

        Raises:
            UserError: Missing keys.
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
    """Model and AdamW under DeepSpeed's ZeRO: optimizer state (and gradients) are partitioned over the ranks.

    Each rank has all weights in fp32, under Accelerate's autocast: DeepSpeed's own bf16 and fp16 would put
    the model itself in half precision.

    Source:
        Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), stages 1 (optimizer state) and 2 (gradients too).
    """

    def _prepare(self) -> None:
        deepspeed = _deepspeed(self.ranks)
        self._parameters = [list(group["params"]) for group in self._adamw.param_groups]
        # Accelerate sets the precision of the forward pass. DeepSpeed flattens parameters as if contiguous.
        model = self._accelerator.prepare_model(self._module, evaluation_mode=True)
        model.to(memory_format=torch.contiguous_format)
        settings = {
            # Required, but used only in DeepSpeed's messages.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._clip_norm,
            "communication_data_type": "bf16" if self._compress_gradients else "fp32",
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
        # DeepSpeed finds AdamW's state only if it exists.
        for partition, _ in self._groups():
            moments = {key: torch.zeros_like(partition) for key in MOMENTS}
            self._adamw.state[partition] = {"step": torch.zeros((), device=partition.device), **moments}
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def _release(self) -> None:
        self._model.destroy()
        super()._release()

    def _groups(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield this rank's partition of each parameter group, and the group's parameters by name."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        for group, parameters in zip(self._adamw.param_groups, self._parameters, strict=True):
            (partition,) = group["params"]
            yield partition, {names[parameter]: parameter for parameter in parameters}

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        self._model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        self._model.backward(loss)

    def step(self) -> Tensor:
        """Clip the gradient, take the step, and return the norm before clipping."""
        self._model.step()
        return torch.as_tensor(self._model.get_global_grad_norm(), device=self.ranks.device)

    def optimizer_state(self) -> dict[str, Tensor]:
        """As `Engine.optimizer_state`, gathered from all ranks."""
        utils, state = importlib.import_module("deepspeed.utils"), {}
        for partition, parameters in self._groups():
            for name, parameter in parameters.items():
                # Each group has one step count.
                state[f"{name}/step"] = self._adamw.state[partition]["step"].clone()
                for key in MOMENTS:
                    state[f"{name}/{key}"] = utils.safe_get_full_optimizer_state(parameter, key)
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """As `Engine.load_optimizer_state`; each rank takes its partition."""
        utils = importlib.import_module("deepspeed.utils")
        for partition, parameters in self._groups():
            for name, parameter in parameters.items():
                # Absent for parameters that were frozen so far.
                if f"{name}/step" in state:
                    for key in MOMENTS:
                        value = state[f"{name}/{key}"].to(parameter.device)
                        utils.safe_set_full_optimizer_state(parameter, value, key)
                    self._adamw.state[partition]["step"].copy_(state[f"{name}/step"])


def _deepspeed(ranks: Ranks) -> Any:
    if ranks.device.type == "cpu":
        # Otherwise DeepSpeed takes the GPUs of a machine that has some.
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"the launch profile asks for ZeRO, but DeepSpeed is not installed ({error});"
            " pip install 'captionscale[deepspeed]', or take --profile gpu"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Reductions in shared memory, for CPUs: compiled at the first run, for no gain here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
