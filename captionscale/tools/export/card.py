"""The model card of an exported run: what it is, its scores and its limits."""

from collections.abc import Iterator
from pathlib import Path

from captionscale.data.storage import open_storage, read_manifest
from captionscale.errors import UserError
from captionscale.html import render
from captionscale.progress import say
from captionscale.score.receipt import Receipt
from captionscale.tools.export.check import Check
from captionscale.train.checkpoint import Checkpoint
from captionscale.vocab import SPECIAL_TOKENS

_DECODERS = {
    "plain": "a decoder that sees the image once",
    "attention": "a decoder that attends to regions for each word",
    "top_down": "a decoder whose attention has an LSTM of its own",
}


def model_card(run: Path, saved: Checkpoint, to: str, checked: Check | None, shards: str | None) -> str:
    """Return the card of a run's exported checkpoint, in Markdown; `to` and `shards` as of `export`."""
    config = saved.config()
    data = config.data
    try:
        splits = read_manifest(open_storage(shards or data.shards, data.cache, data.cache_gb)).splits
    except UserError:
        splits = {}
    return render(
        "card.md",
        to=to,
        name=run.resolve().name,
        model=config.model,
        decoder=_DECODERS.get(config.model.decoder.name, f"the decoder {config.model.decoder.name}"),
        data=data,
        vocabulary_size=len(saved.vocabulary()) - len(SPECIAL_TOKENS),
        step=saved.train_state.step,
        objective=config.train.objective,
        checked=checked,
        receipts=list(_receipts(run, saved)),
        shards=Path(data.shards).name,
        splits=splits,
    )


def _receipts(run: Path, saved: Checkpoint) -> Iterator[Receipt]:
    """Yield the receipts of exactly these weights."""
    for path in sorted(run.rglob("receipt.json")):
        try:
            receipt = Receipt.read(path)
        except UserError as error:
            say(f"note: left out of the card: {error}")
            continue
        if receipt.hashes.get("model") == saved.sha256:
            yield receipt
