"""Settings that exclude each other; no other module checks them."""

from collections.abc import Iterator
from typing import Any, TypeAlias

Config: TypeAlias = Any
"""A `captionscale.config.Config`, whose module imports this one."""

# Higher rates make the captions of self-critical training collapse.
_MAX_SCST_LR = 2e-4


def find_conflicts(config: Config) -> Iterator[str]:
    """Yield one line for each conflict, with its cure."""
    yield from _data_conflicts(config)
    yield from _model_conflicts(config)
    if config.train.objective == "scst":
        yield from _scst_conflicts(config)
    if config.train.global_batch % config.train.micro_batch:
        yield (
            f"train.global_batch = {config.train.global_batch} is not a multiple of"
            f" train.micro_batch = {config.train.micro_batch}; change one of them"
        )
    yield from _search_conflicts(config.search)


def _data_conflicts(config: Config) -> Iterator[str]:
    data, trainable = config.data, config.model.encoder.trainable
    if data.crop_scale[0] > data.crop_scale[1] or data.crop_scale[0] <= 0:
        yield f"data.crop_scale = {list(data.crop_scale)}: expected [least, greatest], both above 0"
    changing = {
        f"model.encoder.trainable = {trainable!r}": trainable != "none",
        f"data.crop_scale = {list(data.crop_scale)}": data.crop_scale != (1.0, 1.0),
        "data.flip = true": data.flip,
        f"data.color_jitter = {data.color_jitter}": data.color_jitter > 0,
        f"data.rotate = {data.rotate}": data.rotate > 0,
    }
    for setting, changes in changing.items():
        if config.train.cache_features and changes:
            yield (
                "train.cache_features needs a frozen encoder and images without augmentation, found"
                f" {setting}; change it, or set train.cache_features = false"
            )


def _model_conflicts(config: Config) -> Iterator[str]:
    train, encoder, decoder = config.train, config.model.encoder, config.model.decoder
    exclusive = {
        "model.encoder.grad_checkpointing": getattr(encoder, "grad_checkpointing", False),
        "train.cache_features": train.cache_features,
    }
    for key, on in exclusive.items():
        if train.compile_encoder and on:
            yield f"train.compile_encoder and {key} exclude each other; leave one of them out"
    stages = len(encoder.trainable) if isinstance(encoder.trainable, tuple) else 1
    for key in ("encoder_lr", "unfreeze_at"):
        value = getattr(train, key)
        if isinstance(value, tuple) and len(value) != stages:
            yield (
                f"train.{key} has {len(value)} values, but model.encoder.trainable names {stages} parts; give"
                " one for each, or one number for all"
            )
    if train.doubly_stochastic_weight and not decoder.has_attention:
        yield (
            f"train.doubly_stochastic_weight = {train.doubly_stochastic_weight:g}, expected 0 with decoder"
            f" '{decoder.name}', which has no attention; leave it out, or change model.decoder.name"
        )


def _search_conflicts(search: Any) -> Iterator[str]:
    if search.groups > 1 and search.method == "sample":
        yield (
            f"search.groups = {search.groups} with search.method = 'sample', expected 1, as only a beam has"
            " groups; set search.groups = 1 or search.method = 'beam'"
        )
    elif search.beam % search.groups:
        yield (
            f"search.beam = {search.beam} is not a multiple of search.groups = {search.groups}; change one of"
            " them"
        )


def _scst_conflicts(config: Config) -> Iterator[str]:
    train = config.train
    if train.init_from is None:
        yield (
            "train.objective = 'scst' without train.init_from: random captions have no reward,"
            " expected a run trained with cross-entropy; set it to that run's folder"
        )
    rates: dict[str, float | tuple[float, ...]] = {"lr": train.lr}
    if config.model.encoder.trainable != "none":
        rates["encoder_lr"] = train.encoder_lr
    for key, value in rates.items():
        if max(value if isinstance(value, tuple) else (value,)) > _MAX_SCST_LR:
            yield (
                f"train.{key} = {value} with train.objective = 'scst', expected at most {_MAX_SCST_LR},"
                " as captions collapse with higher ones; set it to 5e-5 or so"
            )
    for key in ("scheduled_sampling", "doubly_stochastic_weight"):
        if value := getattr(train, key):
            yield (
                f"train.{key} = {value:g}, expected 0 with train.objective = 'scst', as it applies to"
                " human references only; leave it out"
            )
    if not (config.scst.cider_d_weight or config.scst.bleu_4_weight):
        yield "scst.cider_d_weight and scst.bleu_4_weight are both 0, expected a reward; set one of them"
