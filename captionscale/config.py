"""Settings of an experiment: frozen, typed trees that forbid unknown keys.

The name of a field is the TOML key, the `--set` path and the word that errors use; `toml.py` reads them.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from captionscale import credentials, plugins
from captionscale.config_checks import find_conflicts

_LINE = r"^[^\x00-\x1f\x7f]*$"


def _one_line(path: Path) -> Path:
    if not re.fullmatch(_LINE, str(path)):
        raise PydanticCustomError("one_line", "Path should have no control characters")
    return path


# Bounds are far above any experiment: a config from anywhere is not to take the machine's memory.
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Count = Annotated[int, Field(ge=1, le=10**9)]
"""A whole number from 1 on."""
SmallCount = Annotated[int, Field(ge=1, le=1000)]
"""A whole number of things that take memory each."""
Size = Annotated[int, Field(ge=1, le=2**14)]
"""Size of a vector."""
Step = Annotated[int, Field(ge=0, le=10**9)]
"""A whole number from 0 on."""
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A number above 0."""
Weight = Annotated[float, Field(ge=0, le=10**6)]
"""What a part of a sum is multiplied by."""
Text = Annotated[str, Field(pattern=_LINE, max_length=4096)]
"""A line without control characters."""
PlainPath = Annotated[Path, AfterValidator(_one_line)]
"""A path without control characters."""

DEFAULT_CACHE_GB = 100.0
"""What `data.cache_gb` is by default."""

_ONLY_WITH = {
    "region_size": ("attention", "top_down"),
    "num_layers": ("plain", "attention"),
    "attention_gate": ("attention",),
    "image_batch_norm": ("plain",),
}
"""What only these decoders can have otherwise than by default."""


class Section(BaseModel):
    """A part of the tree: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_credentials(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {
            key: credentials.strip_and_remember(value) if isinstance(value, str) else value
            for key, value in tree.items()
        }


class Data(Section):
    """What is read, and the choices that turn stored facts into a batch."""

    shards: Text
    """Folder that `captionscale pack` wrote, or its URL: https://, s3:// or gs://."""
    cache: PlainPath | None = None
    """Folder for the shards of a URL. Without it: $CAPTIONSCALE_CACHE, or ~/.cache/captionscale."""
    cache_gb: float = Field(default=DEFAULT_CACHE_GB, gt=0)
    """Most that this folder may hold, in 10^9 bytes; the least recently used shards make way."""
    train_split: Text = "train"
    """Split to learn from."""
    val_split: Text = "val"
    """Split that early stopping looks at."""
    image_size: int = Field(default=224, ge=32, le=2048)
    """Side of the square picture that the encoder sees, in pixels."""
    crop_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    """Least and greatest share of the picture's area that a random crop keeps. [1, 1]: the centre square."""
    flip: bool = True
    """Mirror half of the training pictures. Switch it off where captions say left and right."""
    color_jitter: Fraction = 0.2
    """How far brightness, contrast and saturation may go from 1 in training."""
    rotate: float = Field(default=0.0, ge=0, le=45)
    """Greatest angle, in degrees, by which training turns a picture to either side."""
    min_count: Count = 5
    """A word is in the vocabulary if the train captions hold it at least so often."""
    max_vocab_size: Count | None = None
    """Keep only so many of the most frequent words."""
    max_words: SmallCount = 20
    """Longest caption, in words; training cuts longer ones, search stops there."""
    shuffle_window_shards: Count = 4
    """Samples are shuffled within windows of so many shards, whose order is shuffled too."""
    workers: SmallCount = 2
    """Threads that decode pictures, in each process."""


class Encoder(Section):
    """The convolutional network that turns a picture into a grid of features."""

    name: Text = "resnet50"
    """A torchvision ResNet or `mobilenet_v2`."""
    weights: Text = "imagenet"
    """`imagenet` (torchvision's download), a .safetensors or .pth file, or `none` (random)."""
    trainable: Literal["all", "none"] | tuple[Text, ...] = "none"
    """Which parts learn: all, none, or leading parts of parameter names such as `layer4`."""
    batch_norm: Literal["frozen", "trained"] = "frozen"
    """`trained` learns batch statistics too: for training from scratch, see docs/design.md."""
    output_stride: Literal[16, 32] = 32
    """Pixels of the picture in a row of each grid cell: 32 makes 7 x 7 cells of 224 pixels, 16 makes 14."""
    grad_checkpointing: bool = False
    """Compute the learning part again in the backward pass instead of keeping it: less memory, more time."""


class Decoder(Section):
    """The recurrent network that writes the caption."""

    name: Literal["plain", "attention", "top_down"] = "attention"
    """`plain` sees the picture once, as its first word; `attention` looks at regions for each word; so does
    `top_down`, whose attention has an LSTM of its own."""
    embed_size: Size = 256
    """Size of a word's vector."""
    hidden_size: Size = 512
    """Size of an LSTM layer's state."""
    attention_size: Size = 512
    """Size in which regions and the state meet (not plain)."""
    region_size: Annotated[int, Field(ge=0, le=2**14)] | None = None
    """Size that regions are projected to. Without it: that of attention_size. 0: they are looked at as the
    encoder gives them, which takes longer (not plain)."""
    num_layers: Annotated[int, Field(ge=1, le=64)] = 2
    """LSTM layers (top_down has always two)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of each word's vector and of each output that training hides."""
    variational_dropout: bool = False
    """Hide the same numbers at all words of a caption: variational dropout."""
    attention_gate: bool = False
    """Scale what attention saw by how much it matters for the word (attention only)."""
    image_batch_norm: bool = False
    """Normalise the picture's vector over the micro-batch (plain only)."""
    word_head: Literal["linear", "deep", "maxout"] = "deep"
    """Words are read from the state alone; also from the last word and what attention saw; or from the
    greater of two such readings."""
    tie_weights: bool = False
    """Let the output share its matrix with the words' vectors."""
    embedding_init: Literal["normal", "unit_norm"] = "normal"
    """Begin with words' vectors about as long as 1, as tied ones do, not sqrt(embed_size) times as long: measured
    to be better in long training, worse in short."""

    @model_validator(mode="after")
    def _fits(self) -> "Decoder":
        for key, names in _ONLY_WITH.items():
            value, only = getattr(self, key), type(self).model_fields[key].default
            if self.name not in names and value != only:
                raise ValueError(
                    f"model.decoder.{key} = {str(value).lower()}, wanted {str(only).lower()} with decoder"
                    f" '{self.name}', as only {' and '.join(map(repr, names))} can have another;"
                    " leave it out, or change model.decoder.name"
                )
        return self


class Model(Section):
    """The captioner."""

    encoder: Encoder = Encoder()
    decoder: Decoder = Decoder()


SCORE_METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")


def _known_metric(name: str) -> str:
    if name not in SCORE_METRICS and not plugins.is_plugin(name):
        expected = f"{', '.join(map(repr, SCORE_METRICS))} or module:Class"
        raise PydanticKnownError("literal_error", {"expected": expected})
    return name


class Train(Section):
    """How the captioner learns."""

    epochs: Count = 30
    """Passes over the train split."""
    steps: Count | None = None
    """Steps of the whole run. Without it: those of all epochs."""
    global_batch: Annotated[int, Field(ge=1, le=10**6)] = 256
    """Pictures in one optimiser step, over all processes. Each brings all its captions."""
    micro_batch: Annotated[int, Field(ge=1, le=10**6)] = 32
    """Pictures in one forward pass. The unit of work: results do not depend on who does it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the forward pass; weights and optimiser stay in fp32."""
    lr: Rate = 5e-4
    """Peak learning rate of the decoder."""
    encoder_lr: Rate | tuple[Rate, ...] = 5e-5
    """Peak learning rate of the encoder's trainable parts: one for all, or one for each."""
    unfreeze_at: Step | tuple[Step, ...] = 0
    """Step from which the encoder's trainable parts learn: one for all, or one for each."""
    cache_features: bool = False
    """Encode each picture only once, and keep that in a file beside the shards; for a frozen encoder, without
    augmentation."""
    compile_encoder: bool = False
    """Let PyTorch compile the encoder's training pass: minutes when a run starts, then faster steps."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps in which the learning rate rises; a cosine then brings it to zero."""
    weight_decay: Weight = 0.01
    """AdamW's, on matrices only."""
    clip_norm: float = Field(default=5.0, gt=0)
    """Greatest norm of the gradient."""
    compress_gradients: bool = False
    """Send gradients between processes in bf16: half the bytes; results then depend on their number."""
    label_smoothing: Fraction = 0.1
    """Share of a target's weight that goes to all words alike (cross-entropy only)."""
    scheduled_sampling: Fraction = 0.0
    """Share of words that training reads from the decoder's own predictions at its end; rises in a line."""
    doubly_stochastic_weight: Weight = 0.0
    """Weight of the penalty on looking at some regions more than at others, over a whole caption."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay, at each step, of the moving average of weights that is scored and captions; 0: the weights."""
    init_from: PlainPath | None = None
    """Run whose best weights are the first ones; it must have the same words and the same model."""
    objective: Literal["cross-entropy", "scst"] = "cross-entropy"
    """Predict the words of people's captions, or write captions that get a high reward: see `scst`."""
    log_every: Count = 10
    """Steps between two lines of log.jsonl."""
    save_every: Count | None = None
    """Steps between two checkpoints. Without it: each epoch."""
    score_every: Count | None = None
    """Steps between two scorings of the validation split. Without it: each epoch."""
    score_metric: Annotated[Text, AfterValidator(_known_metric)] = "CIDEr-D"
    """Metric of generated captions that names the best checkpoint, or `module:Class`."""
    patience: Count = 5
    """Stop after so many scorings without a better one; scores count at the next scoring."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that stay on disk, beside the best one."""
    grace_s: float = Field(default=120.0, ge=0, le=10**9)
    """Seconds before the end of a SLURM job's time at which a run saves and leaves."""
    stall_s: float = Field(default=45.0, gt=0, le=10**6)
    """Seconds without progress after which a stalled rank is named; after ten times as long the run ends."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where metrics go besides TensorBoard; needs captionscale's extra `track`, see docs/running.md."""
    sample_log: bool = False
    """Record the images of every micro-batch in sample_log/, as `captionscale drill` does to prove them."""


class Scst(Section):
    """Self-critical training: sampled captions count by how much better they are than others."""

    samples_per_image: Annotated[int, Field(ge=2, le=1000)] = 5
    """Captions sampled for each picture."""
    baseline: Literal["samples", "greedy"] = "samples"
    """What a sample's reward is compared with: the mean of the picture's other samples, or greedy search."""
    cider_d_weight: Weight = 1.0
    """Weight of CIDEr-D in the reward, where it is 0 to 10."""
    bleu_4_weight: Weight = 0.0
    """Weight of a caption's own BLEU-4 in the reward, where it is 0 to 1."""
    cross_entropy_weight: Fraction = 0.0
    """Share of the loss that is still cross-entropy of people's captions."""
    max_dangling_increase: Fraction = 0.2
    """Share of captions ending in `with a` or the like, above that of the captions it began with, that stops
    the run."""
    min_distinct_ratio: Fraction = 0.1
    """Different captions for each caption, relative to when it began, below which the run stops."""


class Search(Section):
    """How captions are found."""

    method: Literal["beam", "sample"] = "beam"
    """`beam` finds likely captions; `sample` draws one by its probability."""
    beam: SmallCount = 5
    """Captions kept at each word; 1 is greedy search."""
    groups: SmallCount = 1
    """Diverse beam search: parts of the beam that avoid each other's words."""
    diversity_penalty: Weight = 0.5
    """What a word costs for each caption of earlier groups that says it at the same place (with groups)."""
    length_penalty: Annotated[float, Field(ge=0, le=10)] = 0.7
    """Captions are ranked by log-probability / tokens**length_penalty; 0 favours short ones."""
    coverage_weight: Weight = 0.0
    """Weight, in that ranking, of having looked at all regions (not plain)."""
    temperature: float = Field(default=1.0, ge=1e-6, le=10**6)
    """Divides logits before a word is drawn: below 1 likely words get likelier (sample only)."""
    top_k: Count | None = None
    """Draw only from so many of the likeliest words (sample only)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw only from the likeliest words that have this probability together (sample only)."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] = 0
    """Never say so many words in a row that the caption already holds; 0 allows it."""
    allow_unknown: bool = False
    """Whether the token for unknown words may be said."""
    allow_dangling: bool = True
    """Whether a caption may end in `with a` or the like."""
    batch_size: Annotated[int, Field(ge=1, le=10**4)] = 32
    """Pictures captioned at once."""


class Config(Section):
    """An experiment."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """All randomness is a function of it and of the step."""
    data: Data
    model: Model = Model()
    train: Train = Train()
    scst: Scst = Scst()
    search: Search = Search()

    def with_beam(self, beam: int | None) -> "Config":
        """Return these settings with a plain beam search of this width; with these, if there is none."""
        if beam is None:
            return self
        plain = {"method": "beam", "beam": beam, "groups": 1}
        return self.model_copy(update={"search": self.search.model_copy(update=plain)})

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        for conflict in find_conflicts(self):
            raise ValueError(conflict)
        return self
