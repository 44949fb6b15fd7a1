"""Settings of an experiment: frozen, typed trees that forbid unknown keys.

The name of a field is the TOML key, the `--set` path and the word that errors use; `toml.py` reads them.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from captionscale.config_base import (
    Count,
    Fraction,
    PlainPath,
    Rate,
    Section,
    SmallCount,
    Step,
    Text,
    Weight,
    name_or_plugin,
)
from captionscale.config_checks import find_conflicts
from captionscale.config_model import Model

OBJECTIVES = {
    "cross-entropy": "captionscale.train.objective:CrossEntropyObjective",
    "scst": "captionscale.train.scst:ScstObjective",
}
"""Classes of objectives by name."""


SCORE_METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")
DEFAULT_CACHE_GB = 100.0
"""Default of `data.cache_gb`."""


class Data(Section):
    """What training reads, and how samples become batches."""

    shards: Text
    """Folder that `captionscale pack` wrote, or its URL: https://, s3:// or gs://."""
    cache: PlainPath | None = None
    """Cache folder for the shards of a URL. Default: $CAPTIONSCALE_CACHE, or ~/.cache/captionscale."""
    cache_gb: float = Field(default=DEFAULT_CACHE_GB, gt=0)
    """Size limit of the cache, in 10^9 bytes; the least recently used shards are deleted."""
    train_split: Text = "train"
    """Split to train on."""
    val_split: Text = "val"
    """Split to validate on, which early stopping uses."""
    image_size: int = Field(default=224, ge=32, le=2048)
    """Side of the encoder's square input, in pixels."""
    crop_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    """Range of a random crop's area, as a fraction of the image's. [1, 1]: the center square."""
    flip: bool = True
    """Mirror half of the training images. Turn it off if captions say left and right."""
    color_jitter: Fraction = 0.2
    """Largest change of brightness, contrast and saturation in training."""
    rotate: float = Field(default=0.0, ge=0, le=45)
    """Largest rotation in training, in degrees, to either side."""
    min_count: Count = 5
    """A word is in the vocabulary if it occurs at least so often in the train captions."""
    max_vocab_size: Count | None = None
    """Size limit of the vocabulary: the most frequent words stay."""
    max_words: SmallCount = 20
    """Longest caption, in words: training truncates references, decoding stops."""
    shuffle_window_shards: Count = 4
    """Samples are shuffled within windows of so many shards; the shards are shuffled too."""
    workers: SmallCount = 2
    """Threads that decode images, per process."""


class Train(Section):
    """How the captioner is trained."""

    epochs: Count = 30
    """Passes over the train split."""
    steps: Count | None = None
    """Steps of the whole run. Default: those of all epochs."""
    global_batch: Annotated[int, Field(ge=1, le=10**6)] = 256
    """Images per optimizer step, over all processes; each with all its captions."""
    micro_batch: Annotated[int, Field(ge=1, le=10**6)] = 32
    """Images per forward pass. Results do not depend on which process computes it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the forward pass; weights and optimizer state stay in fp32."""
    lr: Rate = 5e-4
    """Peak learning rate of the decoder."""
    encoder_lr: Rate | tuple[Rate, ...] = 5e-5
    """Peak learning rate of the encoder's trainable stages: one for all, or one each."""
    unfreeze_at: Step | tuple[Step, ...] = 0
    """Step from which the encoder's trainable stages train: one for all, or one each."""
    cache_features: bool = False
    """Compute each image's features once, and cache them next to the shards; needs a frozen encoder and no
    augmentation."""
    compile_encoder: bool = False
    """torch.compile the encoder's training pass: a start that takes minutes, then faster steps."""
    warmup_ratio: Fraction = 0.03
    """Fraction of all steps with linear warmup; a cosine decays the learning rate to zero."""
    weight_decay: Weight = 0.01
    """Weight decay of AdamW, on matrices only."""
    clip_norm: float = Field(default=5.0, gt=0)
    """Gradient clipping: largest norm."""
    compress_gradients: bool = False
    """All-reduce gradients in bf16: half the bytes, but results depend on the number of processes."""
    label_smoothing: Fraction = 0.1
    """Label smoothing of the cross-entropy loss."""
    scheduled_sampling: Fraction = 0.0
    """Final probability of feeding the decoder's own prediction; it rises linearly from 0."""
    doubly_stochastic_weight: Weight = 0.0
    """Weight of the doubly stochastic attention penalty."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the weights' moving average (EMA), which is evaluated; 0: no average."""
    init_from: PlainPath | None = None
    """Run whose best weights initialize the model; same model and vocabulary required."""
    objective: Annotated[Text, name_or_plugin(OBJECTIVES)] = "cross-entropy"
    """`cross-entropy` on references, `scst` for a high reward of sampled captions, or `module:Class`."""
    log_every: Count = 10
    """Steps between lines of log.jsonl."""
    save_every: Count | None = None
    """Steps between checkpoints. Default: one epoch."""
    score_every: Count | None = None
    """Steps between validations. Default: one epoch."""
    score_metric: Annotated[Text, name_or_plugin(SCORE_METRICS)] = "CIDEr-D"
    """Metric of generated captions that selects the best checkpoint, or `module:Class`."""
    patience: Count = 5
    """Early stopping: validations without improvement; a score counts at the next one."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep, besides the best one."""
    grace_s: float = Field(default=120.0, ge=0, le=10**9)
    """Seconds before a SLURM job's time limit at which a run saves and exits."""
    stall_s: float = Field(default=45.0, gt=0, le=10**6)
    """Seconds without progress after which a stalled rank is named; the run ends after ten times as many."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Trackers besides TensorBoard; they need captionscale's extra `track`, see docs/running.md."""


class Scst(Section):
    """Self-critical sequence training."""

    samples_per_image: Annotated[int, Field(ge=2, le=1000)] = 5
    """Sampled captions per image."""
    baseline: Literal["samples", "greedy"] = "samples"
    """Baseline of the reward: the mean of the image's other samples, or the greedy caption's reward."""
    cider_d_weight: Weight = 1.0
    """Weight of CIDEr-D (0 to 10) in the reward."""
    bleu_4_weight: Weight = 0.0
    """Weight of sentence BLEU-4 (0 to 1) in the reward."""
    cross_entropy_weight: Fraction = 0.0
    """Weight of the references' cross-entropy in the loss."""
    max_dangling_increase: Fraction = 0.2
    """The run stops when the fraction of captions ending in `with a` or the like has risen by more."""
    min_distinct_ratio: Fraction = 0.1
    """The run stops when the fraction of distinct captions falls below this part of its first value."""


class Search(Section):
    """Decoding strategy."""

    method: Literal["beam", "sample"] = "beam"
    """Beam search, or sampling."""
    beam: SmallCount = 5
    """Beam size; 1 is greedy search."""
    groups: SmallCount = 1
    """Groups of diverse beam search (beam only)."""
    diversity_penalty: Weight = 0.5
    """Hamming diversity penalty between groups (with groups)."""
    length_penalty: Annotated[float, Field(ge=0, le=10)] = 0.7
    """Captions are ranked by log-probability / tokens**length_penalty; 0 favors short ones."""
    temperature: float = Field(default=1.0, ge=1e-6, le=10**6)
    """Divides the logits (sample only)."""
    top_k: Count | None = None
    """Sample only from the k most likely words (sample only)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the most likely words with this total probability (sample only)."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] = 0
    """No n-gram of this size occurs twice in a caption; 0: no limit."""
    allow_unknown: bool = False
    """Whether captions may contain the token for unknown words."""
    allow_dangling: bool = True
    """Whether a caption may end in `with a` or the like."""
    batch_size: Annotated[int, Field(ge=1, le=10**4)] = 32
    """Images per batch."""


class Config(Section):
    """A whole config."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of all randomness, which is a function of it and of the step."""
    data: Data
    model: Model = Model()
    train: Train = Train()
    scst: Scst = Scst()
    search: Search = Search()

    def with_beam(self, beam: int | None) -> "Config":
        """Return the config with a plain beam search of this size; unchanged if it is None."""
        if beam is None:
            return self
        plain = {"method": "beam", "beam": beam, "groups": 1}
        return self.model_copy(update={"search": self.search.model_copy(update=plain)})

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        for conflict in find_conflicts(self):
            raise ValueError(conflict)
        return self
