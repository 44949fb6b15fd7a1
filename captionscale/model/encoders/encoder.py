"""The encoder's interface, for training, the feature cache and plug-ins."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from captionscale import plugins
from captionscale.config_model import ENCODERS, EncoderConfig, Interpolation, Model, find_place
from captionscale.errors import UserError, did_you_mean
from captionscale.model.encoders import weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """Base class of encoders: a new one implements `__init__`, `grid`, and `forward_features` if need be.

    Frozen stages stay in evaluation mode and outside the graph: neither weights nor batch statistics drift.
    """

    Config: ClassVar[type[EncoderConfig]] = EncoderConfig
    """Options in the config's section `model.encoder`."""
    mean: ClassVar[Sequence[float]] = IMAGENET_MEAN
    """Mean of each color channel, from 0 to 1, that `forward_features` expects to be subtracted."""
    std: ClassVar[Sequence[float]] = IMAGENET_STD
    """Standard deviation of each color channel, that it expects to be divided by."""
    interpolation: ClassVar[Interpolation] = "bilinear"
    """How images are resized: `bilinear` or `bicubic`, both antialiased."""
    image_size: ClassVar[int | None] = None
    """Side of the square images that it needs, in pixels, known when `__init__` returns; None: any."""
    num_prefix_tokens: ClassVar[int] = 0
    """Regions before those of the grid, such as a CLS token."""

    def __init__(self, config: EncoderConfig, backbone: nn.Module, feature_size: int):
        """Take the network.

        Args:
            config: Of the class `Config`.
            backbone: Whose parameters train or not; `model.encoder.trainable` names its children.
            feature_size: Size of a region's feature.

        Raises:
            UserError: A trainable stage that the backbone does not have.
        """
        super().__init__()
        if self.interpolation not in get_args(Interpolation):
            raise UserError(
                f"model.encoder.name = '{config.name}': its interpolation is '{self.interpolation}', expected"
                " 'bilinear' or 'bicubic', by which images are resized; change the encoder"
            )
        self.config, self.backbone, self.feature_size = config, backbone, feature_size
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", -mean / std, persistent=False)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self._compiled = False
        self.stages: list[list[nn.Parameter]] = [
            self.trainable_parameters(prefix) for prefix in self._stage_prefixes()
        ]
        """Parameters of each stage in `model.encoder.trainable`, in its order."""
        for parameter in self.backbone.parameters():
            parameter.requires_grad = False
        self.unfreeze(0, [0] * len(self.stages))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of regions of an image of this size."""
        raise NotImplementedError

    def attention_maps(
        self, attention: Float[Tensor, "*batch region"], height: int, width: int
    ) -> Float[Tensor, "*batch row column"]:
        """Return attention weights on the grid of an image of this size, without the prefix tokens'."""
        return torch.unflatten(attention[..., self.num_prefix_tokens :], -1, self.grid(height, width))

    def forward_features(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> Float[Tensor, "image region feature"]:
        """Return the features of normalized images: prefix tokens, then the grid row by row."""
        cells = self.run_backbone(images)
        return cells.flatten(2).transpose(1, 2)

    def load_pretrained(self) -> None:
        """Load the weights that `model.encoder.weights` names.

        Raises:
            UserError: They cannot be read, or are another network's.
        """
        choice = self.config.weights
        if choice != "none":
            state = self._download() if choice == "imagenet" else weights.read(Path(choice))
            weights.load_into(self.backbone, state, self.config)

    def download_weights(self) -> dict[str, Tensor]:
        """Return the backbone's ImageNet weights.

        Raises:
            UserError: There are none, or they cannot be downloaded.
        """
        raise UserError(
            f"model.encoder.weights = 'imagenet': encoder '{self.config.name}' downloads none, expected"
            " 'none' or a .safetensors or .pth file; set model.encoder.weights to one of these"
        )

    def _download(self) -> dict[str, Tensor]:
        try:
            return self.download_weights()
        # Of an encoder of the user's own.
        except OSError as error:
            raise UserError(
                f"model.encoder.weights = 'imagenet': the weights of encoder '{self.config.name}' cannot be"
                f" downloaded ({error}); expected a network connection; set model.encoder.weights to a"
                " .safetensors or .pth file"
            ) from None

    def trainable_parameters(self, prefix: str) -> list[nn.Parameter]:
        """Return the parameters of a stage that train."""
        return [each for name, each in self.backbone.named_parameters() if starts_with(name, prefix)]

    def frozen_modules(self) -> list[nn.Module]:
        """Return the modules that stay in evaluation mode."""
        return [] if self.is_trainable else list(self.backbone.modules())

    @property
    def is_trainable(self) -> bool:
        """Whether any parameter trains."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def identity(self) -> str:
        """Hash of everything that features depend on, apart from image files, image size and precision."""
        unrelated = {"weights", "trainable", "batch_norm", "grad_checkpointing"}
        facts = (type(self).__qualname__, self.config.model_dump_json(exclude=unrelated), self.mean, self.std)
        hasher = hashlib.sha256(repr(facts).encode())
        # Only if it is not the default: the keys of existing feature caches stay.
        if self.interpolation != Encoder.interpolation:
            hasher.update(self.interpolation.encode())
        for name, tensor in sorted(self.backbone.state_dict().items()):
            # A counter that changes no feature.
            if not name.endswith("num_batches_tracked"):
                hasher.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        return hasher.hexdigest()

    def forward(self, images: UInt8[Tensor, "image 3 height width"]) -> Float[Tensor, "image region feature"]:
        """Return the features of images."""
        if not isinstance(self.image_size, int | None):
            raise UserError(
                f"model.encoder.name = '{self.config.name}': its image_size is {self.image_size!r}, expected"
                " an int, as images are square, or None; change the encoder"
            )
        if self.image_size and images.shape[2:] != (self.image_size, self.image_size):
            raise UserError(
                f"data.image_size = {images.shape[2]}: encoder '{self.config.name}' cannot read it, expected"
                f" {self.image_size}; set data.image_size={self.image_size}"
            )
        # (images / 255 - mean) / std, in one pass.
        images = torch.addcmul(self.shift, images.float(), self.scale)
        with torch.set_grad_enabled(self.is_trainable and torch.is_grad_enabled()):
            return self.forward_features(images)

    def run_backbone(self, images: Float[Tensor, "image 3 height width"]) -> Tensor:
        """Call the backbone: compiled in training only, as batches of evaluation have any size."""
        bypass = self._compiled and not self.training
        forward: Callable[[Tensor], Tensor] = self.backbone.forward if bypass else self.backbone
        return forward(images)

    def train(self, mode: bool = True) -> "Encoder":
        """Enter training mode, except for what is frozen."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def compile_training(self) -> None:
        """Compile the backbone's training pass at its first call.

        Raises:
            UserError: PyTorch cannot compile here.
        """
        try:
            torch.compile(torch.neg)(next(self.backbone.parameters()))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"train.compile_encoder: PyTorch cannot compile here ({reason}), expected a C++ compiler, and"
                " Triton on a GPU; install them, or leave it out"
            ) from None
        self.backbone.compile()
        self._compiled = True

    def unfreeze(self, step: int, starts: Sequence[int]) -> bool:
        """Train the stages whose first step in `starts` has come; return whether that changed any."""
        changed = False
        for stage, start in zip(self.stages, starts, strict=True):
            for parameter in stage:
                changed |= parameter.requires_grad != (start <= step)
                parameter.requires_grad = start <= step
        if changed:
            self.train(self.training)
        return changed

    def _stage_prefixes(self) -> Sequence[str]:
        choice = self.config.trainable
        prefixes = {"all": ("",), "none": ()}.get(choice, ()) if isinstance(choice, str) else choice
        names = [name for name, _ in self.backbone.named_parameters()]
        for number, prefix in enumerate(prefixes):
            if prefix and not any(starts_with(name, prefix) for name in names):
                modules = self.backbone.named_modules()
                parts = {
                    place for place, module in modules if place.count(".") < 2 and [*module.parameters()]
                }
                parts = parts - {""} | {"all", "none"}
                raise UserError(
                    f"model.encoder.trainable: {self.config.name} has no part '{prefix}';"
                    f" {did_you_mean(prefix, parts | {'all', 'none'})}"
                )
            for other in prefixes[:number]:
                if starts_with(other, prefix) or starts_with(prefix, other):
                    raise UserError(
                        f"model.encoder.trainable: '{other}' and '{prefix}' overlap, expected disjoint parts;"
                        " leave out one of them, or name the children of the larger one"
                    )
        return prefixes


def encoder_class(name: str) -> type[Any]:
    """Return the class of an encoder by its name or `module:Class`.

    Raises:
        UserError: It cannot be imported, or is no `Encoder`.
    """
    return plugins.load(find_place(name, ENCODERS) or name, Encoder)


def interpolation_of(config: Model) -> Interpolation:
    """Return how images are resized for a captioner with this config."""
    interpolation: Interpolation = encoder_class(config.encoder.name).interpolation
    return interpolation


def starts_with(name: str, prefix: str) -> bool:
    """Return whether a dotted name is, or is within, a prefix."""
    return not prefix or name == prefix or name.startswith(prefix + ".")
