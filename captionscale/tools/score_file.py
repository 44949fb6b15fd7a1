"""Score captions from anywhere, and write the receipt: no model, and no torch."""

from pathlib import Path

from captionscale.data.sources import coco
from captionscale.errors import UserError
from captionscale.files import check_writable
from captionscale.progress import spinner
from captionscale.score import spice
from captionscale.score.receipt import Measure, Receipt, score
from captionscale.score.results import read_results


def score_file(
    captions: Path, references: Path, out: Path | None, measure: Measure, spice_jars: Path | None = None
) -> Receipt:
    """Score a file of captions against a file of references.

    Args:
        captions: COCO results.
        references: COCO captions.
        out: Where the receipt goes, if one is wanted.
        measure: As `receipt.score` has it.
        spice_jars: As `score_run` has it.

    Raises:
        UserError: Files of another layout, other images in both, or a metric that failed.
    """
    if out and out.exists() and any(each.exists() and out.samefile(each) for each in (captions, references)):
        raise UserError(f"{out}: is what is to be scored, wanted a place for the receipt; take another --out")
    if out:
        check_writable(out)
    written, human = read_results(captions), coco.read_references(references)
    with spinner(f"scoring {len(written):,} captions"):
        receipt = score(
            written,
            human,
            measure=measure,
            optional_metrics=[spice.measure(written, human, spice_jars)] if spice_jars else [],
            notes=missing_metrics(spice_jars, "it sees images: score RUN --clip WEIGHTS"),
            provenance={"captions": captions.name, "references": references.name},
        )
    if out:
        receipt.write(out)
    return receipt


def missing_metrics(spice_jars: Path | None, no_clip: str | None) -> list[str]:
    """Return which figures are missing, and for want of what.

    Args:
        spice_jars: Where SPICE's are, if they are.
        no_clip: Why there is no CLIPScore, if there is none.
    """
    notes = [] if spice_jars else ["SPICE: not computed (no --spice DIR)"]
    return notes + ([f"CLIPScore: not computed ({no_clip})"] if no_clip else [])
