"""A page about one run: curves, scores and their diagnostics, example captions, data and environment."""

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from captionscale import toml
from captionscale.data.storage import open_storage, read_manifest
from captionscale.errors import UserError
from captionscale.files import atomic_write, check_writable
from captionscale.html import render
from captionscale.score import diagnostics
from captionscale.score.results import read_results
from captionscale.tools import board, example_captions
from captionscale.tools.curves import curves
from captionscale.tools.run_artifacts import RunArtifacts
from captionscale.tools.run_diff import compare_runs
from captionscale.train.checkpoint import Checkpoint, open_checkpoint
from captionscale.train.run_folder import checkpoint_steps
from captionscale.version import __version__


def report(run: Path, out: Path, *, against: Path | None = None, shards: str | None = None) -> int:
    """Write the page; it needs no other file, no network and no JavaScript.

    Args:
        run: The --out of captionscale train; the run may still be training.
        out: The page.
        against: Another run to compare with.
        shards: Shards to use instead of the run's own.

    Returns:
        The page's size in bytes.

    Raises:
        UserError: It is no run, or the page cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: ends in '{out.suffix}', expected .html; rename it")
    ours = RunArtifacts(run, shards)
    theirs = RunArtifacts(against, shards) if against else None
    check_writable(out)
    sections = {
        "Curves": curves(ours),
        "Scores": _scores(ours, theirs),
        "Can you trust the score?": _diagnostics(ours),
        "Captions": _captions(ours),
        f"Compared with {theirs.name}" if theirs else "": compare_runs(ours, theirs) if theirs else "",
        "Data and environment": _environment(ours),
    }
    page = render(
        "report.html",
        run=ours,
        cards=_cards(ours),
        sections={title: body for title, body in sections.items() if body},
        version=__version__,
        at=datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00") + " UTC",
    ).encode(errors="replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(page)
    return len(page)


def _cards(run: RunArtifacts) -> list[tuple[str, str]]:
    """Return the label and value of each figure at the top of the page."""
    epochs, losses = run.metric("epoch"), run.metric("loss")
    cards = []
    if epochs:
        step = max(epochs)
        train = run.config.train if run.config else None
        if train and train.steps:
            cards.append((f"steps of {train.steps:,} done, {epochs[step]:.3g} epochs", f"{step:,}"))
        else:
            total = f" of {train.epochs}" if train else ""
            cards.append((f"epochs{total} done, {step:,} steps", f"{epochs[step]:.3g}"))
    if losses:
        cards.append(("last loss of a step, nats per word", f"{losses[max(losses)]:.3f}"))
    if run.checkpoint and run.checkpoint.train_state.best_step and run.config:
        state, metric = run.checkpoint.train_state, run.config.train.score_metric
        cards.append(
            (f"best validation {metric}, at step {state.best_step:,}", f"{100 * state.best_score:.1f}")
        )
    for receipt in run.receipts[-1:]:
        name = "CIDEr-D" if "CIDEr-D" in receipt.scores else list(receipt.scores)[-1]
        low, high = receipt.intervals[name]
        label = f"{name} of split {receipt.provenance.get('split', '?')}"
        label += f", 95 % interval {100 * low:.1f} to {100 * high:.1f}"
        cards.append((label, f"{100 * receipt.scores[name]:.1f}"))
    return cards


def _scores(ours: RunArtifacts, theirs: RunArtifacts | None) -> Markup:
    entries = [board.Entry(run.name, each) for run in (ours, theirs) if run for each in run.receipts]
    if not entries:
        return Markup()
    tables = [board.section(table) for table in board.group_into_tables(entries)]
    return render("report_scores.html", tie=board.TIE, tables=tables)


def _diagnostics(run: RunArtifacts) -> Markup:
    if not run.receipts:
        return Markup()
    receipt = run.receipts[-1]
    return render(
        "report_diagnostics.html",
        split=receipt.provenance.get("split", "?"),
        warnings=board.warnings(receipt),
        rows=[("", "model", "references"), *diagnostics.rows(receipt.diagnostics)],
    )


def _captions(run: RunArtifacts) -> Markup:
    """Show captions of the last receipt, or of the last validation."""
    if run.receipts:
        receipt = run.receipts[-1]
        step, split_name = receipt.provenance.get("step"), str(receipt.provenance.get("split"))
        groups, source = example_captions.select_examples(receipt), f"split {split_name}"
        saved = _checkpoint(run, step)
        # Several runs may have written them together.
        saved = saved if saved and saved.sha256 == receipt.hashes.get("model") else None
    elif run.validations and run.config:
        step, path = max(run.validations.items())
        captions = run.try_load(lambda: read_results(path))
        if not captions:
            return Markup()
        split_name, source = run.config.data.val_split, "the validation split, by greedy search"
        groups, saved = example_captions.random_examples(captions), _checkpoint(run, step)
    else:
        return Markup()
    split = run.split(split_name)
    entries = run.try_load(lambda: example_captions.gallery(groups, run.config, split, saved))
    return render(
        "report_captions.html",
        source=source,
        step=step,
        has_images=split is not None,
        has_results=saved is not None,
        plain=run.config is not None and not run.config.model.decoder.has_attention,
        **entries or {"grid": None, "groups": {}},
    )


def _checkpoint(run: RunArtifacts, step: Any) -> Checkpoint | None:
    return (
        run.try_load(lambda: open_checkpoint(run.folder, str(step)))
        if step in checkpoint_steps(run.folder)
        else None
    )


def _environment(run: RunArtifacts) -> Markup:
    place, data = None, []
    if run.config:
        with suppress(UserError):
            place = open_storage(run.shards or run.config.data.shards)
            data = [("split", "images", "captions", "rejected as unreadable")]
            for name, split in read_manifest(place).splits.items():
                data.append((name, f"{split.images:,}", f"{split.captions:,}", f"{split.rejected:,}"))
    facts: list[tuple[str, str]] = []
    if run.checkpoint:
        facts += [
            ("checkpoint", run.checkpoint.folder.name),
            ("sha256 of its weights", run.checkpoint.sha256),
        ]
    for receipt in run.receipts[-1:]:
        environment = toml.flatten(receipt.environment)
        facts += [(f"scored: {key}", str(value)) for key, value in environment.items()]
        facts.append(("measured with", receipt.signature))
    settings = toml.dumps(run.config) if run.config else ""
    return render("report_environment.html", place=place, data=data, facts=facts, settings=settings)
