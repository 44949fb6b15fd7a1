"""Score a run, or captions from anywhere, and write the receipt."""

from pathlib import Path

from captionscale.config import Config
from captionscale.data.loader import Loader
from captionscale.data.places import open_place
from captionscale.data.shards import Split
from captionscale.data.sources import coco
from captionscale.errors import PreemptedError
from captionscale.ranks import Ranks
from captionscale.score.evaluate import Result, caption_split, write_results
from captionscale.score.metrics import Scores, score
from captionscale.score.receipt import read_results, write_receipt
from captionscale.train import preempt
from captionscale.train.checkpoint import Checkpoint, open_run


def score_run(
    run: Path,
    split_name: str,
    *,
    checkpoint: str,
    beam: int | None,
    shards: str | None,
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
        UserError: No run or split, one without captions, damaged files, or a metric that failed.
        PreemptedError: A signal asked it to leave while it captioned.
    """
    saved = open_run(run, checkpoint)
    config = saved.config().with_beam(beam)
    split = _open_split(config, shards, split_name)
    split.need_captions("to score against; captionscale caption --split only captions it")
    step = saved.standing.step
    other = f"-of-{split.sha256[:8]}" if shards else ""
    folder = run / "scores" / f"{split_name}-step-{step:08d}-beam{config.search.beam}{other}"
    place = receipt or folder / "receipt.json"
    results = _caption(saved, config, split)
    if results is None:
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


def caption_run(
    run: Path, split_name: str, *, checkpoint: str, beam: int | None, shards: str | None, out: Path
) -> int | None:
    """Caption a split with a run's model, over all ranks and in fp32, and write COCO results.

    Args:
        run: The --out of captionscale train.
        split_name: Of the run's shards; it need not have captions.
        checkpoint: `best`, `last` or a step.
        beam: Instead of the run's own.
        shards: Instead of the run's own.
        out: Where the results go.

    Returns:
        How many images were captioned; on ranks other than the first nothing.

    Raises:
        UserError: No run or split, damaged files, or a place that cannot be written.
        PreemptedError: A signal asked it to leave while it captioned.
    """
    saved = open_run(run, checkpoint)
    config = saved.config().with_beam(beam)
    results = _caption(saved, config, _open_split(config, shards, split_name))
    if results is None:
        return None
    write_results(results, out)
    return len(results)


def _open_split(config: Config, shards: str | None, name: str) -> Split:
    data = config.data
    return Split(open_place(shards or data.shards, data.cache, data.cache_gb), name)


def _caption(saved: Checkpoint, config: Config, split: Split) -> list[Result] | None:
    """Return a split's captions; on ranks other than the first nothing.

    Raises:
        PreemptedError: A signal asked this or another rank to leave.
    """
    loader = Loader(split, saved.vocabulary(), config.data)
    with preempt.listening(), Ranks() as ranks:
        captioner, title = saved.captioner().to(ranks.device), f"captioning {split.name}"
        results = caption_split(captioner, loader, config.search, ranks, title, asked_to_leave=preempt.asked)
        loader.close()
        first = ranks.first
    if results is None:
        parting = f"{saved.folder}: left before split '{split.name}' was captioned"
        raise PreemptedError(parting if first else "")
    return results if first else None


def score_file(captions: Path, references: Path, receipt: Path | None) -> Scores:
    """Score a file of captions against a file of references.

    Args:
        captions: COCO results.
        references: COCO captions.
        receipt: Where it goes, if one is wanted.

    Raises:
        UserError: Files of another layout, other images in both, or a metric that failed.
    """
    written, human = read_results(captions), coco.references(references)
    scores = score(written, human)
    if receipt:
        write_receipt(receipt, scores, human, {"captions": captions.name, "references": references.name})
    return scores
