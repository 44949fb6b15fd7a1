"""Score a run, or captions from anywhere, and write the receipt."""

from pathlib import Path

from captionscale.data import sources
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.ranks import Ranks
from captionscale.score.evaluate import caption_split, write_results
from captionscale.score.metrics import Scores, score
from captionscale.score.receipt import read_results, write_receipt
from captionscale.train.checkpoint import open_run


def score_run(
    run: Path,
    split_name: str,
    *,
    checkpoint: str,
    beam: int | None,
    shards: Path | None,
    receipt: Path | None,
) -> tuple[Scores | None, Path]:
    """Caption a split with a run's model, over all ranks and in fp32, and score it.

    Args:
        run: The --out of captionscale train.
        split_name: Of the run's shards.
        checkpoint: `best`, `last` or a step.
        beam: Instead of the run's own.
        shards: Instead of the run's own.
        receipt: Where it goes; none: beside the captions, in the run's folder `scores`.

    Returns:
        The scores (on ranks other than the first: none), and where the receipt is.

    Raises:
        UserError: No run or split, damaged files, or a metric that failed.
    """
    saved = open_run(run, checkpoint)
    config = saved.config().with_beam(beam)
    split = Split(shards or config.data.shards, split_name)
    loader = Loader(split, saved.vocabulary(), config.data)
    step = saved.standing.step
    folder = run / "scores" / f"{split_name}-step-{step:08d}-beam{config.search.beam}"
    place = receipt or folder / "receipt.json"
    with Ranks() as ranks:
        captioner = saved.captioner().to(ranks.device)
        results = caption_split(captioner, loader, config.search, ranks, f"captioning {split_name}")
        loader.close()
        if not ranks.first:
            return None, place
    write_results(results, folder / "captions.json")
    references = split.references()
    scores = score({result["image_id"]: result["caption"] for result in results}, references)
    made_by = {
        "split": split.name,
        "shards_sha256": split.sha256,
        "step": step,
        "model_sha256": saved.sha256,
        "search": config.search.model_dump(mode="json"),
    }
    write_receipt(place, scores, references, made_by)
    return scores, place


def score_file(captions: Path, references: Path, receipt: Path | None) -> Scores:
    """Score a file of captions against a file of references.

    Args:
        captions: COCO results.
        references: COCO captions.
        receipt: Where it goes, if one is wanted.

    Raises:
        UserError: Files of another layout, other images in both, or a metric that failed.
    """
    written, human = read_results(captions), sources.coco_references(references)
    scores = score(written, human)
    if receipt:
        write_receipt(receipt, scores, human, {"captions": captions.name, "references": references.name})
    return scores
