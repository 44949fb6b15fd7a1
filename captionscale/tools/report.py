"""A page about one run: curves, scores and their diagnostics, example captions, data and environment."""

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from captionscale import toml
from captionscale.data.storage import open_storage, read_manifest
from captionscale.errors import UserError
from captionscale.files import check_writable
from captionscale.html import render
from captionscale.score import diagnostics
from captionscale.score.comparison import compare
from captionscale.score.receipt import Receipt
from captionscale.score.results import read_results
from captionscale.tools import board, example_captions
from captionscale.tools.curves import curves
from captionscale.tools.run_artifacts import RunArtifacts
from captionscale.train.checkpoint import Checkpoint, open_checkpoint
from captionscale.train.run_folder import checkpoint_steps


def report(run: Path, out: Path, *, against: Path | None = None, shards: str | None = None) -> int:
    """Write a page about a run, which may still be training, and return its size in bytes.

    The page needs no other file, no network and no JavaScript.

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
        f"Compared with {theirs.name}" if theirs else "": _compare_runs(ours, theirs) if theirs else "",
        "Data and environment": _environment(ours),
    }
    return board.write_page(
        out,
        "report.html",
        run=ours,
        cards=_cards(ours),
        sections={title: body for title, body in sections.items() if body},
        at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


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
        state = run.checkpoint.train_state
        label = f"best validation {run.config.train.score_metric}, at step {state.best_step:,}"
        cards.append((label, f"{100 * state.best_score:.1f}"))
    for receipt in run.receipts[-1:]:
        name = board.ranking_metric(list(receipt.scores))
        label = f"{name} of split {receipt.provenance.get('split', '?')}"
        label += f", 95 % interval {board.interval_text(receipt.intervals[name])}"
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
    if step not in checkpoint_steps(run.folder):
        return None
    return run.try_load(lambda: open_checkpoint(run.folder, str(step)))


def _compare_runs(ours: RunArtifacts, theirs: RunArtifacts) -> Markup:
    """Return the differences between two runs as HTML."""
    notices = [*theirs.missing]
    for run, other in ((theirs, ours), (ours, theirs)):
        if not run.receipts:
            command = run.score_command(next(iter(other.scored_splits), ""))
            notices.append(
                f"{run.name} is not scored, so scores cannot be compared: run {command}, then this report"
                " again."
            )
    # The last receipt of each set of references.
    before, after = ({each.hashes["references"]: each for each in run.receipts} for run in (theirs, ours))
    pairs = [(before[references], after[references]) for references in after if references in before]
    if not pairs and ours.receipts and theirs.receipts:
        scored = " and ".join(f"{run.name} ({', '.join(run.scored_splits)})" for run in (theirs, ours))
        notices.append(
            f"Their scores cannot be compared: {scored} have different references. Score both on one split,"
            " then run this report again."
        )
    comparisons = []
    for first, second in pairs:
        try:
            comparisons.append(_compared(first, second, ours, theirs))
        except UserError as error:
            notices.append(str(error))
    return render(
        "report_diff.html",
        ours=ours.name,
        theirs=theirs.name,
        notices=notices,
        settings=_settings(ours, theirs),
        comparisons=comparisons,
    )


def _settings(ours: RunArtifacts, theirs: RunArtifacts) -> list[tuple[str, str, str]] | None:
    """Return the keys that differ, with both values; None if a config is missing."""
    if not (ours.config and theirs.config):
        return None

    def shown(value: Any) -> str:
        return "not set" if value is None else str(value)

    one, other = (toml.flatten(config.model_dump(mode="json")) for config in (theirs.config, ours.config))
    pairs = {key: (one.get(key), other.get(key)) for key in {**one, **other}}
    return [(key, shown(before), shown(after)) for key, (before, after) in pairs.items() if before != after]


def _compared(first: Receipt, second: Receipt, ours: RunArtifacts, theirs: RunArtifacts) -> dict[str, Any]:
    found = compare(first, second)
    rows: list[tuple[str, ...]] = [
        ("", theirs.name, ours.name, "difference", "95 % interval", "p", "images won", "lost", "tied")
    ]
    for each in found.differences:
        low, high = (f"{100 * bound:+.1f}" for bound in each.interval)
        scores = f"{100 * each.first:.1f}", f"{100 * each.second:.1f}", f"{100 * each.difference:+.1f}"
        counts = (f"{count:,}" for count in (each.won, each.lost, each.tied))
        rows.append((each.metric, *scores, f"{low} to {high}", f"{each.p_value:.4f}", *counts))
    changes = [
        (str(image.image_id), f"{100 * image.difference:+.1f}", *image.captions)
        for image in found.most_changed
    ]
    if changes:
        changes.insert(0, ("image", f"change of {found.ranked_by}", theirs.name, ours.name))
    return {"split": second.provenance.get("split", "?"), "rows": rows, "most_changed": changes}


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
        facts = [("checkpoint", run.checkpoint.folder.name), ("sha256 of its weights", run.checkpoint.sha256)]
    for receipt in run.receipts[-1:]:
        facts += [(f"scored: {key}", str(value)) for key, value in toml.flatten(receipt.environment).items()]
        facts.append(("measured with", receipt.signature))
    settings = toml.dumps(run.config) if run.config else ""
    return render("report_environment.html", place=place, data=data, facts=facts, settings=settings)
