"""Metrics, receipts and comparisons; importing this does not import torch."""

from captionscale.score.evaluation import score
from captionscale.score.receipt import Receipt

__all__ = ["Receipt", "score"]
