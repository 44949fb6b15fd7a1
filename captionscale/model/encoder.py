"""The convolutional encoder: a picture becomes a grid of feature vectors."""

from collections import OrderedDict

import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from captionscale import config
from captionscale.errors import UserError, did_you_mean

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


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
        self.trunk = nn.Sequential(
            OrderedDict(
                (name, part) for name, part in parts.items() if name not in ("avgpool", "fc", "classifier")
            )
        )
        self.feature_size: int = getattr(
            network, "fc", getattr(network, "classifier", [None])[-1]
        ).in_features
        # Twice as fast on GPUs in half precision, several times on CPUs.
        self.trunk.to(memory_format=torch.channels_last)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        self._choose_what_learns()

    @property
    def learns(self) -> bool:
        """Whether any part of it does."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, images: UInt8[Tensor, "image 3 height width"]) -> Float[Tensor, "image region feature"]:
        """Return the feature vectors of the grid cells, row by row from the top left."""
        pictures = (images.float() / 255 - self.mean) / self.std
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            grid: Tensor = self.trunk(pictures.contiguous(memory_format=torch.channels_last))
        return grid.flatten(2).transpose(1, 2)

    def train(self, mode: bool = True) -> "Encoder":
        """Enter training mode, except for what is frozen."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _choose_what_learns(self) -> None:
        choice = self.settings.trainable
        names = [name for name, _ in self.trunk.named_parameters()]
        prefixes = {"all": ("",), "none": ()}.get(choice, choice) if isinstance(choice, str) else choice
        for prefix in prefixes:
            if prefix and not any(_starts(name, prefix) for name in names):
                parts = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2)}
                raise UserError(
                    f"model.encoder.trainable: {self.settings.name} has no part '{prefix}';"
                    f" {did_you_mean(prefix, parts)}"
                )
        for name, parameter in self.trunk.named_parameters():
            parameter.requires_grad = any(_starts(name, prefix) for prefix in prefixes)
        if self.settings.batch_norm == "frozen":
            for module in self.trunk.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)

    def _frozen_modules(self) -> list[nn.Module]:
        """Return everything if nothing learns, else the batch norms that do not."""
        if not self.learns:
            return list(self.trunk.modules())
        return [
            module
            for module in self.trunk.modules()
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad
        ]


def _starts(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _known_networks() -> list[str]:
    names: list[str] = torchvision.models.list_models(
        include=["resnet*", "resnext*", "wide_resnet*", "mobilenet_v2"]
    )
    return names
