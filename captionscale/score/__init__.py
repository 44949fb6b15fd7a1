"""Scores and what they are worth; importing this imports no torch."""

from captionscale.score.receipt import Receipt, score

__all__ = ["Receipt", "score"]
