"""Convolutional encoders from torchvision."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captionscale.config_model import TorchvisionConfig
from captionscale.model.encoders.encoder import Encoder, starts_with
from captionscale.model.encoders.weights import download

_CLASSIFIERS = ("avgpool", "fc", "classifier")


class TorchvisionEncoder(Encoder):
    """A torchvision ResNet or MobileNetV2 without its classifier."""

    Config = TorchvisionConfig
    config: TorchvisionConfig

    def __init__(self, config: TorchvisionConfig):
        """Build the network with random weights.

        Raises:
            UserError: A trainable stage that it does not have.
        """
        network = torchvision.models.get_model(config.name, weights=None)
        children = OrderedDict(each for each in network.named_children() if each[0] not in _CLASSIFIERS)
        backbone = nn.Sequential(children)
        if config.output_stride == 16:
            _undo_last_stride(backbone)
        # Twice as fast on GPUs in half precision, several times on CPUs.
        backbone.to(memory_format=torch.channels_last)
        classifier = getattr(network, "fc", getattr(network, "classifier", [None])[-1])
        super().__init__(config, backbone, classifier.in_features)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of regions of an image of this size."""
        stride = self.config.output_stride
        return -(-height // stride), -(-width // stride)

    def run_backbone(self, images: Float[Tensor, "image 3 height width"]) -> Tensor:
        """Call the backbone; with `grad_checkpointing`, keep only stage inputs for the backward pass."""
        images = images.contiguous(memory_format=torch.channels_last)
        if not (torch.is_grad_enabled() and self.config.grad_checkpointing):
            return super().run_backbone(images)
        grid = images
        for stage in _checkpoint_segments(self.backbone):
            if grid.requires_grad or any(parameter.requires_grad for parameter in stage.parameters()):
                # Nothing in a backbone is random.
                grid = checkpoint(
                    stage, grid, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts
                )
            else:
                grid = stage(grid)
        return grid

    def download_weights(self) -> dict[str, Tensor]:
        """Return torchvision's first ImageNet weights."""
        return download(self.config.name)

    def trainable_parameters(self, prefix: str) -> list[nn.Parameter]:
        """Return the parameters of a stage that train: without batch norms unless these are trained."""
        norms = self.config.batch_norm == "trained"
        return [
            parameter
            for place, module in self.backbone.named_modules()
            for name, parameter in module.named_parameters(place, recurse=False)
            if starts_with(name, prefix) and (norms or not isinstance(module, nn.BatchNorm2d))
        ]

    def frozen_modules(self) -> list[nn.Module]:
        """Return the modules that stay in evaluation mode: all, or the batch norms that do not train."""
        norms = [module for module in self.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        return super().frozen_modules() or [norm for norm in norms if not norm.weight.requires_grad]

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_statistics(self.backbone)


def _undo_last_stride(backbone: nn.Module) -> None:
    """Halve the stride and dilate what follows, so that pretrained weights fit a grid twice as fine.

    Each second cell of each second row equals that of the coarse grid.

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
    """Return the parts between which activations are smallest, in the order of the forward pass."""
    parts = list(backbone.children())
    if len(parts) == 1:
        return list(parts[0].children())
    # A ResNet: convolution, norm, ReLU and pooling, then the layers.
    return [nn.Sequential(*parts[:4]), *parts[4:]]


@contextmanager
def _frozen_statistics(backbone: nn.Module) -> Iterator[None]:
    """Keep batch statistics from counting recomputed images again."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
