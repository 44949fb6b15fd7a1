"""The whole pipeline on synthetic images, with the commands that a user runs on COCO."""

import sys
from pathlib import Path

import numpy as np
from rich.table import Table

from captionscale import subprocesses
from captionscale.data import manifest, synthetic
from captionscale.data.sources import coco
from captionscale.errors import UserError
from captionscale.escape import for_shell
from captionscale.progress import SafeConsole, console, say
from captionscale.score.metrics import METRICS, measure
from captionscale.score.receipt import Receipt

COUNTS = {"train": 2000, "val": 150, "test": 250}
SIZE = 96
_SAMPLES = 5
_MIN_RATIO = 3


def quickstart(out: Path) -> None:
    """Draw, pack, verify, train, score, caption, report; finished steps are not repeated.

    Args:
        out: Folder for images, shards and run.

    Raises:
        SystemExit: A command failed; it has reported why.
        UserError: The captioner has learned next to nothing, so this installation does not work.
    """
    drawn, packed, run = out / "coco", out / "shards", out / "run"
    if not (packed / manifest.MANIFEST).exists() or manifest.read(packed).splits.keys() != COUNTS.keys():
        say(f"drawing {sum(COUNTS.values()):,} images into {drawn}, in the layout of COCO 2017")
        synthetic.write_coco(drawn, counts=COUNTS, size=SIZE)
        for split in COUNTS:
            images, captions = drawn / f"{split}2017", _captions(drawn, split)
            _run(
                "pack", "coco", "--images", images, "--captions", captions, "--split", split, "--out", packed
            )
    _run("verify", packed)
    _run("train", "quickstart", "--set", f"data.shards={packed}", "--out", run)
    receipt = run / "receipt.json"
    _run("score", run, "--split", "test", "--out", receipt)
    samples = sorted((drawn / "test2017").iterdir())[:_SAMPLES]
    output = _run("caption", run, *samples)
    _run("report", run, "--out", out / "report.html")
    _show(drawn, receipt, [line.split("\t")[1] for line in output.splitlines()])
    say("", f"all results on one page, with attention: open {out / 'report.html'}")


def random_captions(train: dict[int, list[str]], image_ids: list[int]) -> dict[int, str]:
    """Return a random training caption for each image, a baseline without any knowledge of the images."""
    pool = [caption for captions in train.values() for caption in captions]
    picks = np.random.default_rng(0).integers(len(pool), size=len(image_ids))
    return {image_id: pool[pick] for image_id, pick in zip(image_ids, picks, strict=True)}


def _show(drawn: Path, receipt: Path, captions: list[str]) -> None:
    """Print the scores with those of random captions, and captions with their references."""
    references = coco.read_references(_captions(drawn, "test"))
    train = coco.read_references(_captions(drawn, "train"))
    chance = measure(random_captions(train, list(references)), references).values
    found = Receipt.read(receipt).scores
    table = Table(title=f"{len(references)} images not used in training")
    for heading in ("metric", "captionscale", "random training captions", "ratio"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for name in METRICS:
        ratio = f"{found[name] / chance[name]:.1f}" if chance[name] else "-"
        table.add_row(name, f"{found[name]:.3f}", f"{chance[name]:.3f}", ratio)
    out = SafeConsole()
    out.print(table)
    for image, caption in zip(sorted((drawn / "test2017").iterdir()), captions, strict=False):
        out.print(f"\n{image}")
        out.print(f"  {caption}", style="bold")
        for reference in references[int(image.stem)][:3]:
            out.print(f"  {reference}", style="dim")
    model, random = found["CIDEr-D"], chance["CIDEr-D"]
    if model < _MIN_RATIO * random:
        raise UserError(
            f"{receipt}: CIDEr-D {model:.3f}, expected {_MIN_RATIO} times the {random:.3f} of random"
            " captions, so this installation does not learn; run make test to see what is broken"
        )


def _captions(drawn: Path, split: str) -> Path:
    return drawn / "annotations" / f"captions_{split}2017.json"


def _run(*words: str | Path) -> str:
    """Run a captionscale command where the user sees it, and return what it printed."""
    command = ["captionscale", *map(str, words)]
    console().print(f"\n$ {for_shell(*command)}", style="bold", soft_wrap=True)
    done = subprocesses.run([sys.executable, "-m", *command])
    print(done.stdout, end="")
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout
