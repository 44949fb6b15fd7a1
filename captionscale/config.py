"""Settings of an experiment: TOML files read into frozen, typed trees that forbid unknown keys.

The name of a field is the TOML key, the `--set` path and the word that errors use.
"""

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from captionscale import assets
from captionscale.errors import UserError, did_you_mean

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

CACHE_GB = 100.0


class Section(BaseModel):
    """A part of the tree: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Data(Section):
    """What is read, and the choices that turn stored facts into a batch."""

    shards: str
    """Folder that `captionscale pack` wrote, or its URL: https://, s3:// or gs://."""
    cache: Path | None = None
    """Folder for the shards of a URL. Without it: $CAPTIONSCALE_CACHE, or ~/.cache/captionscale."""
    cache_gb: float = Field(default=CACHE_GB, gt=0)
    """Most that this folder may hold, in 10^9 bytes; the least recently used shards make way."""
    train_split: str = "train"
    """Split to learn from."""
    val_split: str = "val"
    """Split that early stopping looks at."""
    image_size: int = Field(default=224, ge=32)
    """Side of the square picture that the encoder sees, in pixels."""
    crop_scale: tuple[Share, Share] = (0.5, 1.0)
    """Least and greatest share of the picture's area that a random crop keeps. [1, 1]: the centre square."""
    flip: bool = True
    """Mirror half of the training pictures. Switch it off where captions say left and right."""
    colour_jitter: Share = 0.2
    """How far brightness, contrast and saturation may go from 1 in training."""
    min_count: Count = 5
    """A word is in the vocabulary if the train captions hold it at least so often."""
    max_vocabulary: Count | None = None
    """Keep only so many of the most frequent words."""
    max_words: Count = 20
    """Longest caption, in words; training cuts longer ones, search stops there."""
    shuffle_shards: Count = 4
    """Samples are shuffled within windows of so many shards, whose order is shuffled too."""
    workers: Count = 2
    """Threads that decode pictures, in each process."""


class Encoder(Section):
    """The convolutional network that turns a picture into a grid of features."""

    name: str = "resnet50"
    """A torchvision ResNet or `mobilenet_v2`."""
    weights: str = "imagenet"
    """`imagenet` (torchvision's download), a .safetensors or .pth file, or `none` (random)."""
    trainable: Literal["all", "none"] | tuple[str, ...] = "none"
    """Which parts learn: all, none, or leading parts of parameter names such as `layer4`."""
    batch_norm: Literal["frozen", "trained"] = "frozen"
    """`trained` learns batch statistics too: for training from scratch, see docs/design.md."""


class Decoder(Section):
    """The recurrent network that writes the caption."""

    name: Literal["plain", "attention"] = "attention"
    """`plain` sees the picture once, as its first word; `attention` looks at regions for each word."""
    embed: Count = 256
    """Size of a word's vector."""
    hidden: Count = 512
    """Size of an LSTM layer's state."""
    attend: Count = 512
    """Size that regions are projected to, and in which the state meets them (attention only)."""
    layers: Count = 2
    """LSTM layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of each word's vector and of each output that training hides."""


class Model(Section):
    """The captioner."""

    encoder: Encoder = Encoder()
    decoder: Decoder = Decoder()


class Train(Section):
    """How the captioner learns."""

    epochs: Count = 30
    """Passes over the train split."""
    steps: Count | None = None
    """Steps of the whole run. Without it: those of all epochs."""
    global_batch: Count = 256
    """Pictures in one optimiser step, over all processes. Each brings all its captions."""
    micro_batch: Count = 32
    """Pictures in one forward pass. The unit of work: results do not depend on who does it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the forward pass; weights and optimiser stay in fp32."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate of the decoder."""
    encoder_lr: float = Field(default=5e-5, gt=0)
    """Peak learning rate of the encoder's trainable part."""
    warmup: Share = 0.03
    """Share of all steps in which the learning rate rises; a cosine then brings it to zero."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's, on matrices only."""
    clip_norm: float = Field(default=5.0, gt=0)
    """Greatest norm of the gradient."""
    compress_gradients: bool = False
    """Send gradients between processes in bf16: half the bytes; results then depend on their number."""
    label_smoothing: Share = 0.1
    """Share of a target's weight that goes to all words alike."""
    log_every: Count = 10
    """Steps between two lines of log.jsonl."""
    save_every: Count | None = None
    """Steps between two checkpoints. Without it: each epoch."""
    score_every: Count | None = None
    """Steps between two scorings of the validation split. Without it: each epoch."""
    score_metric: Literal["BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D"] = "CIDEr-D"
    """Metric of generated captions that names the best checkpoint."""
    patience: Count = 5
    """Stop after so many scorings without a better one; scores count at the next scoring."""
    keep: Count = 2
    """Newest checkpoints that stay on disk, beside the best one."""
    grace_s: float = Field(default=120.0, ge=0)
    """Seconds before the end of a SLURM job's time at which a run saves and leaves."""
    stall_s: float = Field(default=45.0, gt=0)
    """Seconds without progress after which a stalled rank is named; after ten times as long the run ends."""
    ledger: bool = False
    """Record the images of every micro-batch in ledger/, as `captionscale drill` does to prove them."""


class Search(Section):
    """How captions are found."""

    beam: Count = 5
    """Captions kept at each word; 1 is greedy search."""
    length_power: Annotated[float, Field(ge=0)] = 0.7
    """Captions are ranked by log-probability / tokens**length_power; 0 favours short ones."""
    batch: Count = 32
    """Pictures captioned at once."""


class Config(Section):
    """An experiment."""

    seed: int = Field(default=0, ge=0)
    """All randomness is a function of it and of the step."""
    data: Data
    model: Model = Model()
    train: Train = Train()
    search: Search = Search()

    def with_beam(self, beam: int | None) -> "Config":
        """Return these settings with another beam; with these, if there is none."""
        if beam is None:
            return self
        return self.model_copy(update={"search": self.search.model_copy(update={"beam": beam})})

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        train, data = self.train, self.data
        if train.global_batch % train.micro_batch:
            raise ValueError(
                f"train.global_batch = {train.global_batch} is no whole number of"
                f" train.micro_batch = {train.micro_batch}; change one of them"
            )
        if data.crop_scale[0] > data.crop_scale[1] or data.crop_scale[0] <= 0:
            raise ValueError(
                f"data.crop_scale = {list(data.crop_scale)}: wanted [least, greatest], both above 0"
            )
        return self


def load(source: str | Path, changes: Sequence[str] = ()) -> Config:
    """Read an experiment.

    Args:
        source: A path, or the name of a file in `configs/`.
        changes: `section.key=value` each, the value as TOML writes it (a bare word is a string).

    Raises:
        UserError: No such file, no TOML, an unknown key, or a value out of its range.
    """
    path = assets.find("configs", str(source), ".toml")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}; correct that line") from None
    for change in changes:
        _put(tree, change)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(path, changes, tree, error.errors()))) from None


def dumps(config: Config) -> str:
    """Return the whole tree as TOML, defaults included, that `load` reads back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested tree as one level of dotted keys.

    Example:
        >>> flatten({"seed": 1, "train": {"lr": 0.1}})
        {'seed': 1, 'train.lr': 0.1}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _put(tree: dict[str, Any], change: str) -> None:
    """Write one `section.key=value` into the tree."""
    key, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"--set {change}: no '='; write --set section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {change}: '{section}' is a value, not a section; see captionscale config")
    tree[last] = value


def _explain(
    path: Path, changes: Sequence[str], tree: dict[str, Any], findings: Iterable[Any]
) -> Iterator[str]:
    """Turn pydantic's findings into place, found, wanted, cure: one line for each key."""
    for (section, key), group in groupby(findings, lambda found: _locate(found["loc"])):
        first, *others = group
        if not key:
            yield f"{path}: {first['ctx']['error']}"
            continue
        *sections, name = key
        place = ": ".join([str(path), ".".join(sections)] if sections else [str(path)])
        if change := next((each for each in changes if each.split("=")[0].strip() == ".".join(key)), None):
            place = f"--set {change}"
        if first["type"] == "extra_forbidden":
            yield f"{place}: unknown key '{name}'; {did_you_mean(name, section.model_fields)}"
        elif first["type"] == "missing" and first["loc"] == key:
            yield f"{place}: key '{name}' is missing; add it to the file or pass --set {'.'.join(key)}=..."
        else:
            messages = dict.fromkeys(
                found["msg"][:1].lower() + found["msg"][1:] for found in (first, *others)
            )
            meaning = section.model_fields[name].description or "a section"
            yield f"{place}: {name} = {reduce(getitem, key, tree)!r}: {' or '.join(messages)} ({meaning})"


def _locate(place: tuple[Any, ...]) -> tuple[type[Section], tuple[Any, ...]]:
    """Return the section and the key that a finding is about.

    What follows the key in pydantic's place is an item of the value, or a type that it tried.
    """
    section: type[Section] = Config
    for depth, name in enumerate(place, start=1):
        field = section.model_fields.get(name)
        inner = field.annotation if field else None
        if depth == len(place) or not (isinstance(inner, type) and issubclass(inner, Section)):
            return section, place[:depth]
        section = inner
    return section, ()
