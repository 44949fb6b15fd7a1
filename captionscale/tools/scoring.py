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
from captionscale.tools.ensemble import CheckpointEnsemble
from captionscale.tools.score_file import all_metrics, missing_metrics
from captionscale.train import preemption
from captionscale.train.generation import caption_split
from captionscale.vocab import SPECIAL_TOKENS

HISTORY = "history.jsonl"


def score_run(
    members: CheckpointEnsemble,
    split_name: str,
    *,
    shards: str | None,
    out: Path | None,
    measure: Measure,
    spice_jars: Path | None = None,
    clip: tuple[Path, str] | None = None,
    metrics: Sequence[str] = (),
) -> tuple[Receipt | None, Path]:
    """Caption a split with a run's model, over all ranks and in fp32, and score it.

    Each call adds a line to `scores/history.jsonl` in the run folder.

    Args:
        members: The run, or an ensemble whose first run gets the files.
        split_name: Of the run's shards.
        shards: Shards to use instead of the run's own.
        out: The receipt's file; default: next to the captions, in the run's folder `scores`.
        measure: As in `evaluation.score`.
        spice_jars: Folder of Stanford CoreNLP's jars; without it, no SPICE.
        clip: CLIP's weights and its model's name; without them, no CLIPScore.
        metrics: The user's own, as `module:Class`.

    Returns:
        The receipt (None on ranks other than the first), and its path.

    Raises:
        UserError: No such split, one without captions, damaged files, or a metric that failed.
        PreemptedError: A signal stopped it while captioning.
    """
    saved, config, run = members.checkpoints[0], members.config, members.runs[0]
    # What these lack is an error before an hour of captioning, not after it.
    chosen = [*all_metrics(spice_jars, metrics)]
    # Only one process needs its memory.
    loaded = clipscore.load(*clip) if clip and _is_first_rank() else None
    split = _open_split(config, split_name, shards)
    split.require_captions("to score against; captionscale caption --split only captions it")
    step = saved.train_state.step
    other = f"-of-{split.sha256[:8]}" if shards else ""
    folder = run / "scores" / f"{split_name}-step-{step:08d}-{members.search_label}{other}"
    place = out or folder / "receipt.json"
    results = _caption(members, split, place, folder / "captions.json")
    if results is None:
        return None, place
    write_results(results, folder / "captions.json")
    train, notes = _train_captions(config)
    vocabulary = saved.vocabulary()
    captions, references = {result["image_id"]: result["caption"] for result in results}, split.references()
    if loaded:
        chosen += clipscore.measure(split, captions, references, loaded)
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
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
            hardware={"torch": torch.__version__, **gpu},
            notes=[*notes, *missing_metrics(spice_jars, None if clip else "no --clip WEIGHTS")],
        )
    receipt.write(place)
    _add_to_history(members, split, scores=receipt.scores, receipt=receipt.sha256)
    return receipt, place


def caption_run(
    members: CheckpointEnsemble,
    split_name: str,
    *,
    shards: str | None,
    out: Path,
    prefix: str = "",
    require: Sequence[str] = (),
) -> int | None:
    """Caption a split with a run's model, over all ranks and in fp32, and write COCO results.

    Like `score_run`, it adds a line to the run's history.

    Args:
        members: The run, or an ensemble.
        split_name: Of the run's shards; it need not have captions.
        shards: Shards to use instead of the run's own.
        out: The results file.
        prefix: Words that every caption begins with.
        require: Words that every caption contains.

    Returns:
        The number of images; None on ranks other than the first.

    Raises:
        UserError: No such split, damaged files, or an output that cannot be written.
        PreemptedError: A signal stopped it while captioning.
    """
    split = _open_split(members.config, split_name, shards)
    results = _caption(members, split, out, prefix=prefix, require=require)
    if results is None:
        return None
    write_results(results, out)
    _add_to_history(members, split, captions=str(out.resolve()))
    return len(results)


def _open_split(config: Config, name: str, shards: str | None) -> Split:
    data = config.data
    return Split(open_storage(shards or data.shards, data.cache, data.cache_gb), name)


def _is_first_rank() -> bool:
    """Before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def _add_to_history(members: CheckpointEnsemble, split: Split, **result: object) -> None:
    """Add a line to the run's history, which shows how often a split was used."""
    history = members.runs[0] / "scores" / HISTORY
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
    members: CheckpointEnsemble, split: Split, *outputs: Path, prefix: str = "", require: Sequence[str] = ()
) -> list[Result] | None:
    """Return a split's captions, or None on other ranks than the first; raise PreemptedError on a signal."""
    # Otherwise an hour of captioning is lost. Only rank 0 writes.
    for path in outputs if _is_first_rank() else ():
        check_writable(path)
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
        storage = open_storage(data.shards, data.cache, data.cache_gb)
        if not isinstance(storage, LocalStorage):
            # All images would have to be downloaded with them.
            raise UserError(f"{storage} is no folder of this machine")
        split = Split(storage, data.train_split, check_sizes=False)
        with progress("train captions", len(split), transient=True) as bar:
            captions: list[str] = []
            for item in range(len(split)):
                captions += split.captions(item)
                bar.advance()
    except UserError as error:
        return None, [f"novel captions were not counted: {error}"]
    return captions, []
