"""The command `quickstart`: the whole pipeline on synthetic images, with the commands for COCO."""

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
            files = ("--images", drawn / f"{split}2017", "--captions", _captions(drawn, split))
            _run("pack", "coco", *files, "--split", split, "--out", packed)
    _run("verify", packed)
    _run("train", "quickstart", "--set", f"data.shards={packed}", "--out", run)
    receipt = run / "receipt.json"
    _run("score", run, "--split", "test", "--out", receipt)
    samples = sorted((drawn / "test2017").iterdir())[:_SAMPLES]
    output = _run("caption", run, *samples)
    _run("report", run, "--out", out / "report.html")
    _show(drawn, receipt, [line.split("\t")[1] for line in output.splitlines()])
    say("", f"all results on one page, with attention: open {out / 'report.html'}")


def _show(drawn: Path, receipt: Path, captions: list[str]) -> None:
    """Print the scores with those of random captions, and captions with their references."""
    references = coco.read_references(_captions(drawn, "test"))
    # A baseline without any knowledge of the images.
    train = [text for texts in coco.read_references(_captions(drawn, "train")).values() for text in texts]
    picks = np.random.default_rng(0).integers(len(train), size=len(references))
    random_captions = {image_id: train[pick] for image_id, pick in zip(references, picks, strict=True)}
    chance = measure(random_captions, references).values
    found = Receipt.read(receipt).scores
    table = Table("metric", title=f"{len(references)} images not used in training")
    for heading in ("captionscale", "random training captions", "ratio"):
        table.add_column(heading, justify="right")
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
    if found["CIDEr-D"] < _MIN_RATIO * chance["CIDEr-D"]:
        raise UserError(
            f"{receipt}: CIDEr-D {found['CIDEr-D']:.3f}, expected {_MIN_RATIO} times the"
            f" {chance['CIDEr-D']:.3f} of random captions, so this installation does not learn;"
            " run make test to see what is broken"
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
