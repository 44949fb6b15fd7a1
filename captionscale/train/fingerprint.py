"""What a resume may not change: one list for `train` and `doctor`."""

from collections.abc import Mapping
from typing import Any

from captionscale import toml
from captionscale.config import Config

_FREE = ("data.shards", "data.cache", "data.cache_gb", "data.workers", "model.encoder.weights")
_FIXED_TRAIN = {"global_batch", "micro_batch", "score_metric", "objective", "ema_decay", "init_from"}
_HASHES = {"shards", "vocabulary"}


def make_fingerprint(config: Config, **hashes: str) -> dict[str, Any]:
    """Return the settings that a resume may not change, and SHA-256 hashes of `shards` and `vocabulary`.

    Ranks, nodes, workers and paths may change.
    """
    settings = toml.flatten(config.model_dump(mode="json", include={"seed", "data", "model"}))
    for key in _FREE:
        del settings[key]
    train = toml.flatten({"train": config.train.model_dump(mode="json", include=_FIXED_TRAIN)})
    scst = {f"scst.{key}": value for key, value in config.scst if config.train.objective == "scst"}
    return {**hashes, **settings, **train, **scst}


def resume_conflicts(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the changes that prevent a resume, such as `seed was 0, now 1`; missing hashes are unknown."""
    unknown = _HASHES - current.keys()
    return [
        f"{key} was {_short(saved.get(key))}, now {_short(current.get(key))}"
        for key in {**saved, **current}
        if key not in unknown and saved.get(key) != current.get(key)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else text[:12] + "...'"
