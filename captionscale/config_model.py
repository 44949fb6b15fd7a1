"""The config's section `model`: each decoder has a class of its own for its options."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, WrapValidator

from captionscale import plugins
from captionscale.config_base import Section, Size, Text, name_or_plugin
from captionscale.errors import UserError

Interpolation = Literal["bilinear", "bicubic"]
"""How images can be resized."""


_TORCHVISION = "captionscale.model.encoders.torchvision:TorchvisionEncoder"
_TORCHVISION_NAMES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2", "wide_resnet50_2"),
    *("wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
ENCODERS = dict.fromkeys(_TORCHVISION_NAMES, _TORCHVISION)
"""Class of an encoder by `model.encoder.name`; the first name of a class is its smallest network's."""

DECODERS = {
    "plain": "captionscale.model.decoders.plain:PlainDecoder",
    "attention": "captionscale.model.decoders.attention:AttentionDecoder",
    "top_down": "captionscale.model.decoders.top_down:TopDownDecoder",
}
"""Class of a decoder by `model.decoder.name`."""


class EncoderConfig(Section):
    """The network that turns an image into region features; a base for the encoders' own options."""

    name: Annotated[Text, name_or_plugin(ENCODERS)] = "resnet50"
    """The encoder: one of captionscale's, or `module:Class`."""
    weights: Text = "none"
    """`imagenet` (torchvision's download), a .safetensors or .pth file, or `none` (random)."""
    trainable: Literal["all", "none"] | tuple[Text, ...] = "none"
    """Stages that train: all, none, or leading parts of parameter names such as `layer4`."""

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> type[Section]:
        """Return the class of the encoder that a config names; this one if there is no such encoder."""
        place = find_place(str(tree.get("name", "resnet50")), ENCODERS)
        return _config_of(place, EncoderConfig) if place else cls


class TorchvisionConfig(EncoderConfig):
    """A torchvision network without its classifier."""

    weights: Text = "imagenet"
    """`imagenet` (torchvision's download), a .safetensors or .pth file, or `none` (random)."""
    batch_norm: Literal["frozen", "trained"] = "frozen"
    """`trained` learns batch statistics too: for training from scratch, see docs/design.md."""
    output_stride: Literal[16, 32] = 32
    """Pixels of the image per grid cell and side: 32 makes 7 x 7 cells of 224 pixels, 16 makes 14 x 14."""
    grad_checkpointing: bool = False
    """Recompute activations of the trained stages in the backward pass: less memory, more time."""


class DecoderConfig(Section):
    """The network that writes the caption; base class of each decoder's options."""

    has_attention: ClassVar[bool] = True
    """Whether the decoder returns attention weights."""
    name: Annotated[Text, name_or_plugin(DECODERS)]
    """The decoder: one of captionscale's, or `module:Class`."""

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> type[Section]:
        """Return the class of the decoder that a config names; this one if there is no such decoder."""
        place = find_place(str(tree.get("name", "attention")), DECODERS)
        return _config_of(place, DecoderConfig) if place else cls


class RecurrentConfig(DecoderConfig):
    """Options that all decoders with an LSTM have."""

    embed_size: Size = 256
    """Size of a word embedding."""
    hidden_size: Size = 512
    """Size of an LSTM layer's state."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Dropout probability on regions, word embeddings and before the output layer."""
    variational_dropout: bool = False
    """Use one dropout mask for all words of a caption."""
    word_head: Literal["linear", "deep", "maxout"] = "deep"
    """What the output layer reads: the state; also the last word and the context; or a maxout of these."""
    tie_weights: bool = False
    """Share the output matrix with the word embedding."""
    embedding_init: Literal["normal", "unit_norm"] = "normal"
    """Length of initial word embeddings: about sqrt(embed_size), or about 1 as with tied weights: better
    in long training, worse in short."""


class PlainConfig(RecurrentConfig):
    """Show and Tell: the image is the first word."""

    has_attention = False
    name: Literal["plain"] = "plain"
    num_layers: Annotated[int, Field(ge=1, le=64)] = 2
    """LSTM layers."""
    image_batch_norm: bool = False
    """Batch-normalize the image embedding over the micro-batch."""


class AttendingConfig(RecurrentConfig):
    """Options that all decoders with additive attention have."""

    attention_size: Size = 512
    """Size of the attention's hidden layer."""
    region_size: Annotated[int, Field(ge=0, le=2**14)] | None = None
    """Size that regions are projected to. Default: attention_size. 0: no projection, which takes longer."""


class AttentionConfig(AttendingConfig):
    """Show, Attend and Tell: attention to regions at each word."""

    name: Literal["attention"] = "attention"
    num_layers: Annotated[int, Field(ge=1, le=64)] = 2
    """LSTM layers."""
    attention_gate: bool = False
    """Scale the context by a sigmoid of the state."""


class TopDownConfig(AttendingConfig):
    """Bottom-Up and Top-Down: an LSTM for attention and one for language."""

    name: Literal["top_down"] = "top_down"


_CONFIGS: dict[str, type[Section]] = {
    _TORCHVISION: TorchvisionConfig,
    DECODERS["plain"]: PlainConfig,
    DECODERS["attention"]: AttentionConfig,
    DECODERS["top_down"]: TopDownConfig,
}
"""Configs known without an import of torch."""


def find_place(name: str, registry: Mapping[str, str]) -> str | None:
    """Return the `module:Class` of an encoder or decoder; None: there is none of that name."""
    return name if plugins.is_plugin(name) else registry.get(name)


def _config_of(place: str, base: type[Section]) -> type[Section]:
    """Return the `Config` of a class."""
    if known := _CONFIGS.get(place):
        return known
    kind = "encoder" if base is EncoderConfig else "decoder"
    expected = f"captionscale.model.{kind}s.{kind}.{kind.title()}"
    network = plugins.load(place, object, expected)
    found = getattr(network, "Config", None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"model.{kind}.name = {place!r}: found {network!r:.60} with Config {found!r:.60}, expected a"
            f" class derived from {expected}, whose Config is derived from {base.__module__}.{base.__name__};"
            " see docs/extending.md"
        )
    return found


def _by_name(base: type[EncoderConfig | DecoderConfig]) -> WrapValidator:
    """Validate a section by the class that its `name` selects."""

    def validate(value: Any, validate_base: Any) -> Any:
        if not isinstance(value, dict):
            return validate_base(value)
        name = value.get("name")
        registry = ENCODERS if base is EncoderConfig else DECODERS
        # Of an unknown name only the name is an error: its options are unknown too.
        known = name is None or find_place(str(name), registry)
        return base.of(value).model_validate(value if known else {"name": name})

    return WrapValidator(validate)


class Model(Section):
    """The captioner."""

    encoder: Annotated[SerializeAsAny[EncoderConfig], _by_name(EncoderConfig)] = TorchvisionConfig()
    decoder: Annotated[SerializeAsAny[DecoderConfig], _by_name(DecoderConfig)] = AttentionConfig()
