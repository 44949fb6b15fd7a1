"""The convolutional encoder: an image becomes a grid of feature vectors."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captionscale import config
from captionscale.errors import UserError, did_you_mean

IMAGENET_MEAN, IMAGENET_STD = (
    torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
"""Of ImageNet's colours, from 0 to 1: what torchvision's weights expect to be taken out."""


class Encoder(nn.Module):
    """A torchvision network without its classifier.

    What does not learn also stays in evaluation mode and outside the graph, so that neither its weights
    nor its batch statistics drift.
    """

    def __init__(self, settings: config.Encoder):
        """Build the network with random weights.

        Raises:
            UserError: An unknown network, or a trainable part that it does not have.
        """
        super().__init__()
        self.settings = settings
        known = _known_networks()
        if settings.name not in known:
            raise UserError(
                f"model.encoder.name: unknown '{settings.name}'; {did_you_mean(settings.name, known)}"
            )
        network = torchvision.models.get_model(settings.name, weights=None)
        parts = OrderedDict(network.named_children())
        self.backbone = nn.Sequential(
            OrderedDict(
                (name, part) for name, part in parts.items() if name not in ("avgpool", "fc", "classifier")
            )
        )
        if settings.output_stride == 16:
            _undo_last_stride(self.backbone)
        self.feature_size: int = getattr(
            network, "fc", getattr(network, "classifier", [None])[-1]
        ).in_features
        # Twice as fast on GPUs in half precision, several times on CPUs.
        self.backbone.to(memory_format=torch.channels_last)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", -IMAGENET_MEAN / IMAGENET_STD, persistent=False)
        self.register_buffer("scale", 1 / (255 * IMAGENET_STD), persistent=False)
        self._compiled = False
        self.stages: list[list[nn.Parameter]] = self._trainable_stages()
        """What may learn of each part that `model.encoder.trainable` names, in its order."""
        for parameter in self.backbone.parameters():
            parameter.requires_grad = False
        self.unfreeze(0, [0] * len(self.stages))

    @property
    def is_trainable(self) -> bool:
        """Whether any part of it does."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, images: UInt8[Tensor, "image 3 height width"]) -> Float[Tensor, "image region feature"]:
        """Return the feature vectors of the grid cells, row by row from the top left."""
        # (images / 255 - IMAGENET_MEAN) / IMAGENET_STD, in one pass.
        images = torch.addcmul(self.shift, images.float(), self.scale)
        learning = self.is_trainable and torch.is_grad_enabled()
        # A call finds what is compiled; evaluation goes past that, with batches of any size.
        past = self._compiled and not self.training
        forward: Callable[[Tensor], Tensor] = self.backbone.forward if past else self.backbone
        if learning and self.settings.grad_checkpointing:
            forward = self._forward_checkpointed
        with torch.set_grad_enabled(learning):
            grid = forward(images.contiguous(memory_format=torch.channels_last))
        return grid.flatten(2).transpose(1, 2)

    def train(self, mode: bool = True) -> "Encoder":
        """Enter training mode, except for what is frozen."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def compile_training(self) -> None:
        """Have the backbone's pass compiled for training, when it is first called.

        Raises:
            UserError: PyTorch cannot compile here.
        """
        try:
            torch.compile(torch.neg)(next(self.backbone.parameters()))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"train.compile_encoder: PyTorch cannot compile here ({reason}), wanted a C++ compiler, and"
                " Triton on a GPU; install them, or leave it out"
            ) from None
        self.backbone.compile()
        self._compiled = True

    def unfreeze(self, step: int, starts: Sequence[int]) -> bool:
        """Let the parts learn whose step has come, and no others.

        Args:
            step: The next one of the run, from 0.
            starts: Of each part, in the order of `stages`.

        Returns:
            Whether other parts learn now than before.
        """
        changed = False
        for part, start in zip(self.stages, starts, strict=True):
            for parameter in part:
                changed |= parameter.requires_grad != (start <= step)
                parameter.requires_grad = start <= step
        if changed:
            self.train(self.training)
        return changed

    def _trainable_stages(self) -> list[list[nn.Parameter]]:
        choice = self.settings.trainable
        names = [name for name, _ in self.backbone.named_parameters()]
        prefixes = {"all": ("",), "none": ()}.get(choice, choice) if isinstance(choice, str) else choice
        for number, prefix in enumerate(prefixes):
            if prefix and not any(_starts(name, prefix) for name in names):
                parts = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2)}
                raise UserError(
                    f"model.encoder.trainable: {self.settings.name} has no part '{prefix}';"
                    f" {did_you_mean(prefix, parts)}"
                )
            for other in prefixes[:number]:
                if _starts(other, prefix) or _starts(prefix, other):
                    raise UserError(
                        f"model.encoder.trainable: '{other}' and '{prefix}' overlap, wanted parts that share"
                        " nothing; leave out one of them, or name what is in the greater one"
                    )
        norms = self.settings.batch_norm == "trained"
        return [
            [
                parameter
                for place, module in self.backbone.named_modules()
                for name, parameter in module.named_parameters(place, recurse=False)
                if _starts(name, prefix) and (norms or not isinstance(module, nn.BatchNorm2d))
            ]
            for prefix in prefixes
        ]

    def _forward_checkpointed(self, images: Tensor) -> Tensor:
        """Do what the backbone does, but keep of what learns only the stages' inputs for the backward pass."""
        grid = images
        for stage in _checkpoint_segments(self.backbone):
            if grid.requires_grad or any(parameter.requires_grad for parameter in stage.parameters()):
                # Nothing in a backbone is random.
                grid = checkpoint(
                    stage, grid, use_reentrant=False, preserve_rng_state=False, context_fn=self._twice
                )
            else:
                grid = stage(grid)
        return grid

    def _twice(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _at_rest(self.backbone)

    def _frozen_modules(self) -> list[nn.Module]:
        """Return everything if nothing learns, else the batch norms that do not."""
        if not self.is_trainable:
            return list(self.backbone.modules())
        return [
            module
            for module in self.backbone.modules()
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad
        ]


def _undo_last_stride(backbone: nn.Module) -> None:
    """Make the grid twice as fine: pretrained weights see what they saw, at twice as many places.

    Each second cell of each second row is what it was with the stride.

    Source:
        Yu et al. 2017, "Dilated Residual Networks" (arXiv:1705.09914), section 2.
    """
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    wide = [convolution.kernel_size == (3, 3) for convolution in convolutions]
    last = max(n for n, each in enumerate(convolutions) if wide[n] and each.stride == (2, 2))
    convolutions[last].stride = (1, 1)
    for n, convolution in enumerate(convolutions[last + 1 :], start=last + 1):
        convolution.stride = (1, 1)  # A shortcut's.
        if wide[n]:
            convolution.dilation = convolution.padding = (2, 2)


def _checkpoint_segments(backbone: nn.Module) -> list[nn.Module]:
    """Return the parts between which a backbone's grid is smallest, in the order of its forward pass."""
    parts = list(backbone.children())
    if len(parts) == 1:
        return list(parts[0].children())
    # A ResNet: convolution, norm, ReLU and pooling, then the layers.
    return [nn.Sequential(*parts[:4]), *parts[4:]]


@contextmanager
def _at_rest(backbone: nn.Module) -> Iterator[None]:
    """Keep batch statistics from counting the same images again."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _starts(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _known_networks() -> list[str]:
    names: list[str] = torchvision.models.list_models(
        include=["resnet*", "resnext*", "wide_resnet*", "mobilenet_v2"]
    )
    return names
