"""What the file of a receipt must hold, so that nobody who reads one stumbles later."""

from collections.abc import Iterable
from typing import Any

import msgspec

from captionscale import parsing
from captionscale.score.diagnostics import Diagnostics
from captionscale.score.metrics import METRICS, family

_NUMBERS = {"BLEU": 10, "METEOR": 23}
"""What an image's statistics are, of each family; of others a figure and a count."""


class _Images(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[Any]
    captions: list[str]
    scores: dict[str, list[float]]
    statistics: dict[str, list[list[float]]]


class _Hashes(msgspec.Struct):
    captions: str
    references: str


class _Counts(msgspec.Struct):
    images: int
    captions: int
    empty_captions: int
    words: int
    references: int


class _Tree(msgspec.Struct, forbid_unknown_fields=True):
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    bootstrap: dict[str, Any]
    diagnostics: Diagnostics
    counts: _Counts
    hashes: _Hashes
    signature: str
    provenance: dict[str, Any]
    notes: list[str]
    environment: dict[str, Any]
    images: _Images


def check(tree: dict[str, Any]) -> None:
    """Prove that a receipt's file has all parts, of the right kind, and that they fit each other.

    Args:
        tree: What the file holds, but for its format and its own hash.

    Raises:
        ValueError: What is wrong, and where.
    """
    found = parsing.convert(tree, _Tree)
    images, metrics = found.images, found.scores.keys()
    count = len(images.ids)
    if {type(image_id) for image_id in images.ids} not in ({int}, {str}):
        raise ValueError("images.ids are not all numbers, nor all texts")
    if not metrics:
        raise ValueError("it has no scores")
    for metric in metrics:
        if family(metric) == "BLEU" and metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r:.40}")
    _prove_equal("intervals", found.intervals, metrics)
    _prove_equal("images.scores", images.scores, metrics)
    _prove_equal("images.statistics", images.statistics, {family(metric) for metric in metrics})
    lengths = {len(images.captions), *map(len, images.scores.values()), *map(len, images.statistics.values())}
    if lengths != {count}:
        raise ValueError(f"images has not {count} of each thing")
    for name, rows in images.statistics.items():
        if {len(row) for row in rows} != {_NUMBERS.get(name, 2)}:
            raise ValueError(f"images.statistics.{name:.40} has rows of another length")


def _prove_equal(place: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    if odd := set(found) ^ set(wanted):
        raise ValueError(f"{place} and scores are not of the same metrics ({min(odd):.40})")
