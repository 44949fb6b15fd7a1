"""The model card: what an exported run is, what it scores, and what it cannot do."""

from collections.abc import Iterator
from pathlib import Path

from captionscale.data.storage import open_storage, read_manifest
from captionscale.errors import UserError
from captionscale.escape import for_markdown, for_markdown_code
from captionscale.progress import say
from captionscale.score.receipt import Receipt
from captionscale.tools.export.check import Check
from captionscale.train.checkpoint import Checkpoint
from captionscale.vocab import SPECIAL_TOKENS

_HEAD = """---
library_name: captionscale
pipeline_tag: image-to-text
tags:
- image-captioning
---
"""
_USES = {
    "onnx": """`encoder.onnx` makes features of pictures (bytes, RGB), `start.onnx` makes the first state of
them, and `step.onnx` reads a word and a state and gives the logits of the next word, where the decoder
looked, and what changed of the state. `example.py` has greedy and beam search over them and needs numpy,
onnxruntime and pillow:

```
python example.py photo.jpg --beam 5
```
""",
    "torch": """Each of `encoder.pt2`, `start.pt2` and `step.pt2` takes a tuple of tensors and gives one: from
pictures (bytes, RGB) to features, from these to the first state, and from a word and a state to the logits of
the next word, where the decoder looked, and what changed of the state:

```python
import torch
encoder = torch.export.load("encoder.pt2").module()
(features,) = encoder((pictures,))
```
""",
    "hub": """With `pip install captionscale`, and this folder downloaded as `model`:

```python
import captionscale
for caption in captionscale.load("model").caption(["photo.jpg"]):
    print(caption.caption, caption.log_prob)
```
""",
}


def model_card(run: Path, saved: Checkpoint, to: str, checked: Check | None, shards: str | None) -> str:
    """Return the card, in Markdown.

    Args:
        run: The run's folder, whose receipts tell the scores.
        saved: What was exported.
        to: What for.
        checked: How it compares with the run.
        shards: As of `export`.
    """
    parts = [
        f"{_HEAD if to == 'hub' else ''}# {for_markdown(run.resolve().name)}",
        *_model(saved),
        "## Use",
        _USES[to],
        *_agreement(checked),
        "## Scores",
        *_scores(run, saved),
        "## Data",
        *_data(saved, shards),
        "## Limits",
        *_limits(saved),
    ]
    return "\n".join(parts) + "\n"


def _model(saved: Checkpoint) -> Iterator[str]:
    config = saved.config()
    model, train = config.model, config.train
    kind = {
        "plain": "a decoder that sees the picture once",
        "attention": "a decoder that looks at regions for each word",
        "top_down": "a decoder whose attention has an LSTM of its own",
    }[model.decoder.name]
    yield (
        f"\nWrites a caption of a picture. A `{model.encoder.name}` reads the centre square at"
        f" {config.data.image_size} x {config.data.image_size} pixels; {kind} (`{model.decoder.name}`) writes"
        f" at most {config.data.max_words} of {len(saved.vocabulary()) - len(SPECIAL_TOKENS):,} words. Trained for"
        f" {saved.train_state.step:,} steps by captionscale (last objective: {train.objective}).\n"
    )


def _agreement(checked: Check | None) -> Iterator[str]:
    if checked is not None:
        yield (
            f"\nCompared with the model on {checked.images} images: no logit differs by more than"
            f" {checked.logits:.1e}, and greedy search writes the same captions.\n"
        )


def _scores(run: Path, saved: Checkpoint) -> Iterator[str]:
    """Say what the receipts of these very weights say."""
    found = 0
    for path in sorted(run.rglob("receipt.json")):
        try:
            receipt = Receipt.read(path)
        except UserError as error:
            say(f"note: left out of the card: {error}")
            continue
        if receipt.hashes.get("model") != saved.sha256:
            continue
        found += 1
        counts = receipt.counts
        yield (
            f"\nSplit {for_markdown_code(str(receipt.provenance['split']))}: {counts['images']:,} images,"
            f" {counts['references']:,} references.\n\n| metric | score | 95 % interval |\n|---|---|---|"
        )
        for name, value in receipt.scores.items():
            low, high = receipt.intervals[name]
            yield f"| {for_markdown(name)} | {value:.4f} | {low:.4f} to {high:.4f} |"
        yield f"\nMeasured as {for_markdown_code(receipt.signature)}; receipt `{receipt.sha256[:12]}`.\n"
        yield from (f"* {for_markdown(note)}" for note in receipt.notes)
    if not found:
        yield "\nThese weights were not scored; `captionscale score RUN --split NAME` does so.\n"


def _data(saved: Checkpoint, shards: str | None) -> Iterator[str]:
    data = saved.config().data
    trained = f"{for_markdown_code(data.train_split)} of {for_markdown_code(Path(data.shards).name)}"
    try:
        splits = read_manifest(open_storage(shards or data.shards, data.cache, data.cache_gb)).splits
    except UserError:
        yield f"\nTrained on split {trained}, which was not at hand for this card.\n"
        return
    yield f"\nTrained on split {trained}:\n"
    yield "| split | images | captions |\n|---|---|---|"
    yield from (
        f"| {for_markdown(split)} | {facts.images:,} | {facts.captions:,} |"
        for split, facts in splits.items()
    )
    yield ""


def _limits(saved: Checkpoint) -> Iterator[str]:
    data = saved.config().data
    yield (
        f"""
* It says what people wrote of pictures like those that it was trained on, with their habits and prejudices.
  Of other pictures it may say, fluently, what is not there.
* It has no word that the train captions do not hold at least {data.min_count} times, reads no text and knows
  no names.
* What lies outside of the centre square it does not see; of small things it sees little.
* Scores by references reward the wording of the references. They do not measure whether a caption is true,
  and intervals are of the choice of images alone.
* Nobody has tested it for decisions about people, for describing pictures to those who cannot check them, or
  for anything where an error harms.
* The licences of the train data and of the encoder's first weights may bind its use: ask there."""
    )
