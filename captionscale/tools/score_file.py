"""Score a file of captions; this needs no model, and does not import torch."""

from collections.abc import Sequence
from pathlib import Path

from captionscale.data.sources import coco
from captionscale.errors import UserError
from captionscale.files import check_writable
from captionscale.progress import spinner
from captionscale.score.evaluation import Measure, score
from captionscale.score.metrics import METRICS, Metrics, resolve
from captionscale.score.receipt import Receipt
from captionscale.score.results import read_results
from captionscale.score.spice import Spice


def score_file(
    captions: Path,
    references: Path,
    out: Path | None,
    measure: Measure,
    spice_jars: Path | None = None,
    metrics: Sequence[str] = (),
) -> Receipt:
    """Score a file of captions against a file of references.

    Args:
        captions: COCO results.
        references: COCO captions.
        out: The receipt's file, if any.
        measure: As in `evaluation.score`.
        spice_jars: Folder of Stanford CoreNLP's jars; without it, no SPICE.
        metrics: The user's own, as `module:Class`.

    Raises:
        UserError: Files of another format, different images in both, or a metric that failed.
    """
    if out and out.exists() and any(each.exists() and out.samefile(each) for each in (captions, references)):
        raise UserError(f"{out}: is an input file, expected a path for the receipt; take another --out")
    if out:
        check_writable(out)
    chosen = all_metrics(spice_jars, metrics)
    results, texts = read_results(captions), coco.read_references(references)
    with spinner(f"scoring {len(results):,} captions"):
        receipt = score(
            results,
            texts,
            chosen,
            measure=measure,
            notes=missing_metrics(spice_jars, "it needs images: score RUN --clip WEIGHTS"),
            provenance={"captions": captions.name, "references": references.name},
        )
    if out:
        receipt.write(out)
    return receipt


def all_metrics(spice_jars: Path | None, own: Sequence[str]) -> Metrics:
    """Return captionscale's metrics, SPICE if there are jars, and the user's own (UserError)."""
    return [*METRICS, *([Spice(spice_jars)] if spice_jars else []), *(resolve(own) if own else [])]


def missing_metrics(spice_jars: Path | None, no_clip: str | None) -> list[str]:
    """Return notes on the metrics that are not computed; `no_clip`: why there is no CLIPScore."""
    notes = [] if spice_jars else ["SPICE: not computed (no --spice DIR)"]
    return notes + ([f"CLIPScore: not computed ({no_clip})"] if no_clip else [])
