"""Caption a split with a run's model, and score it."""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from captionscale import toml
from captionscale.config import Config
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.data.storage import LocalStorage, open_storage
from captionscale.distributed.ranks import Ranks
from captionscale.errors import PreemptedError, UserError
from captionscale.files import append_lines, check_writable
from captionscale.model.encoders.encoder import interpolation_of
from captionscale.progress import progress, say, spinner
from captionscale.score import clipscore
from captionscale.score.evaluation import Measure, score
from captionscale.score.receipt import Receipt
from captionscale.score.results import Result, write_results
from captionscale.tools.ensemble import CheckpointEnsemble, open_ensemble
from captionscale.tools.score_file import all_metrics, missing_metrics
from captionscale.train import preemption
from captionscale.train.generation import caption_split
from captionscale.vocab import SPECIAL_TOKENS

HISTORY = "history.jsonl"


def score_run(
    run: Path,
    split_name: str,
    *,
    checkpoint: str,
    shards: str | None,
    out: Path | None,
    overrides: Sequence[str] = (),
    others: Sequence[Path] = (),
    measure: Measure,
    spice_jars: Path | None = None,
    clip: tuple[Path, str] | None = None,
    metrics: Sequence[str] = (),
) -> tuple[Receipt | None, Path]:
    """Caption a split with a run's model, over all ranks and in fp32, and score it.

    Each call adds a line to `scores/history.jsonl` in the run folder.

    Args:
        run: The --out of captionscale train.
        split_name: Of the run's shards.
        checkpoint: `best`, `last` or a step.
        shards: Shards to use instead of the run's own.
        out: The receipt's file; default: next to the captions, in the run's folder `scores`.
        overrides: `search.key=value` each.
        others: Other runs of the ensemble.
        measure: As in `evaluation.score`.
        spice_jars: Folder of Stanford CoreNLP's jars; without it, no SPICE.
        clip: CLIP's weights and its model's name; without them, no CLIPScore.
        metrics: The user's own, as `module:Class`.

    Returns:
        The receipt (None on ranks other than the first), and its path.

    Raises:
        UserError: No run or split, one without captions, damaged files, or a metric that failed.
        PreemptedError: A signal stopped it while captioning.
    """
    members = open_ensemble(run, others, checkpoint=checkpoint, overrides=overrides)
    saved, config = members.checkpoints[0], members.config
    # What these lack is an error before an hour of captioning, not after it.
    chosen = [*all_metrics(spice_jars, metrics)]
    # Only one process needs its memory.
    loaded = clipscore.load(*clip) if clip and _first() else None
    split = _open_split(config, shards, split_name)
    split.require_captions("to score against; captionscale caption --split only captions it")
    step = saved.train_state.step
    other = f"-of-{split.sha256[:8]}" if shards else ""
    folder = run / "scores" / f"{split_name}-step-{step:08d}-{members.search_label}{other}"
    place = out or folder / "receipt.json"
    _check_writable(place, folder / "captions.json")
    results = _caption(members, split)
    if results is None:
        return None, place
    write_results(results, folder / "captions.json")
    train, notes = _train_captions(config)
    vocabulary = saved.vocabulary()
    captions, references = {result["image_id"]: result["caption"] for result in results}, split.references()
    if loaded:
        chosen += clipscore.measure(split, captions, references, loaded)
    with spinner(f"scoring {len(captions):,} captions"):
        receipt = score(
            captions,
            references,
            chosen,
            measure=measure,
            train_captions=train,
            vocabulary_size=len(vocabulary) - len(SPECIAL_TOKENS),
            provenance={
                "run": run.resolve().name,
                "split": split.name,
                "step": step,
                "search": config.search.model_dump(mode="json"),
                **members.provenance(),
                "precision": "fp32",
                "seed": config.seed,
                "objective": config.train.objective,
                "end_token_rewarded": config.train.objective == "scst",
            },
            hashes={
                "shards": split.sha256,
                "model": members.sha256,
                "config": hashlib.sha256(toml.dumps(saved.config()).encode()).hexdigest(),
                "vocabulary": vocabulary.sha256,
            },
            hardware=_hardware(),
            notes=[*notes, *missing_metrics(spice_jars, None if clip else "no --clip WEIGHTS")],
        )
    receipt.write(place)
    _remember(run, members, split, scores=receipt.scores, receipt=receipt.sha256)
    return receipt, place


def caption_run(
    run: Path,
    split_name: str,
    *,
    checkpoint: str,
    shards: str | None,
    out: Path,
    overrides: Sequence[str] = (),
    others: Sequence[Path] = (),
    prefix: str = "",
    require: Sequence[str] = (),
) -> int | None:
    """Caption a split with a run's model, over all ranks and in fp32, and write COCO results.

    Like `score_run`, it adds a line to the run's history.

    Args:
        run: The --out of captionscale train.
        split_name: Of the run's shards; it need not have captions.
        checkpoint: `best`, `last` or a step.
        shards: Shards to use instead of the run's own.
        out: The results file.
        overrides: `search.key=value` each.
        others: Other runs of the ensemble.
        prefix: Words that every caption begins with.
        require: Words that every caption contains.

    Returns:
        How many images were captioned; None on ranks other than the first.

    Raises:
        UserError: No run or split, damaged files, or an output that cannot be written.
        PreemptedError: A signal stopped it while captioning.
    """
    members = open_ensemble(run, others, checkpoint=checkpoint, overrides=overrides)
    split = _open_split(members.config, shards, split_name)
    _check_writable(out)
    results = _caption(members, split, prefix=prefix, require=require)
    if results is None:
        return None
    write_results(results, out)
    _remember(run, members, split, captions=str(out.resolve()))
    return len(results)


def _open_split(config: Config, shards: str | None, name: str) -> Split:
    data = config.data
    return Split(open_storage(shards or data.shards, data.cache, data.cache_gb), name)


def _first() -> bool:
    """Return whether this is rank 0, before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def _check_writable(*places: Path) -> None:
    # Otherwise an hour of captioning is lost. Only rank 0 writes.
    for place in places if _first() else ():
        check_writable(place)


def _remember(run: Path, members: CheckpointEnsemble, split: Split, **result: object) -> None:
    """Add a line to the run's history, which shows how often a split was used."""
    history = run / "scores" / HISTORY
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "split": split.name,
        "shards": split.sha256,
        "step": members.checkpoints[0].train_state.step,
        "search": members.config.search.model_dump(mode="json"),
        **members.provenance(),
        **result,
    }
    try:
        history.parent.mkdir(exist_ok=True)
        append_lines(history, json.dumps(line).encode())
    except OSError as error:
        # The result itself was written.
        say(f"{history}: cannot be written ({error.strerror}), so this is not in it; make it writable")


def _caption(
    members: CheckpointEnsemble, split: Split, *, prefix: str = "", require: Sequence[str] = ()
) -> list[Result] | None:
    """Return a split's captions, or None on other ranks than the first; raise PreemptedError on a signal."""
    saved, config = members.checkpoints[0], members.config
    interpolation = interpolation_of(config.model)
    loader = Loader(split, saved.vocabulary(), config.data, config.seed, interpolation=interpolation)
    with preemption.handle_signals(), Ranks() as ranks:
        results = caption_split(
            members.captioner().to(ranks.device),
            loader,
            config.search,
            ranks,
            f"captioning {split.name}",
            prefix=prefix,
            require=require,
            should_stop=preemption.requested,
        )
        loader.close()
        first = ranks.is_main
    if results is None:
        parting = f"{saved.folder}: left before split '{split.name}' was captioned"
        raise PreemptedError(parting if first else "")
    return results if first else None


def _train_captions(config: Config) -> tuple[list[str] | None, list[str]]:
    """Return the train captions, or None and the reason."""
    data = config.data
    try:
        place = open_storage(data.shards, data.cache, data.cache_gb)
        if not isinstance(place, LocalStorage):
            # All images would have to be downloaded with them.
            return None, [f"novel captions were not counted: {place} is no folder of this machine"]
        split = Split(place, data.train_split, check_sizes=False)
        with progress("train captions", len(split), transient=True) as bar:
            captions: list[str] = []
            for item in range(len(split)):
                captions += split.captions(item)
                bar.advance()
    except UserError as error:
        return None, [f"novel captions were not counted: {error}"]
    return captions, []


def _hardware() -> dict[str, str]:
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"torch": torch.__version__, **gpu}
