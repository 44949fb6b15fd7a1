"""One page about a run: what it says, where it looked, why it stopped improving, what it is made of."""

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from string import Template

from captionscale import toml
from captionscale.data.storage import open_storage, read_manifest
from captionscale.errors import UserError
from captionscale.escape import for_html, for_shell
from captionscale.files import atomic_write, check_writable
from captionscale.score import diagnostics
from captionscale.score.results import read_results
from captionscale.tools import board, example_captions
from captionscale.tools.curves import curves
from captionscale.tools.markup import notice, table
from captionscale.tools.run_artifacts import RunArtifacts
from captionscale.tools.run_diff import compare_runs
from captionscale.train.checkpoints import open_checkpoint
from captionscale.train.run_folder import checkpoint_steps
from captionscale.version import __version__


def report(run: Path, out: Path, *, against: Path | None = None, shards: str | None = None) -> int:
    """Write the page; it needs no other file, no network and no JavaScript.

    Args:
        run: The --out of captionscale train, which may be at work.
        out: Where the page goes.
        against: Another run, to tell what changed.
        shards: Instead of the run's own.

    Returns:
        The page's size in bytes.

    Raises:
        UserError: No run at all, or a place that cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: ends in '{out.suffix}', wanted .html; name it so")
    ours = RunArtifacts(run, shards)
    theirs = RunArtifacts(against, shards) if against else None
    check_writable(out)
    sections = {
        "Curves": curves(ours),
        "Scores": _scores(ours, theirs),
        "Is a score to be believed?": _panels(ours),
        "Captions": _captions(ours),
        f"Against {theirs.name}" if theirs else "": compare_runs(ours, theirs) if theirs else "",
        "What it is made of": _made(ours),
    }
    shown = {title: body for title, body in sections.items() if body}
    # Last: it tells what all others found missing.
    summary = _todo(ours) + _cards(ours)
    parts = [
        f'<section id="part{number}"><h2>{for_html(title)}</h2>{body}</section>'
        for number, (title, body) in enumerate(shown.items())
    ]
    links = [f'<a href="#part{number}">{for_html(title)}</a>' for number, title in enumerate(shown)]
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=for_html(ours.name),
        version=for_html(__version__),
        style=board.style(),
        summary=_sentence(ours),
        contents="".join(links),
        sections=summary + "\n".join(parts),
        at=datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00") + " UTC",
    ).encode(errors="replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(page)
    return len(page)


def _sentence(run: RunArtifacts) -> str:
    """Say in a line what was trained on what."""
    config = run.config
    if config is None:
        return "A run without a checkpoint that can be read: this page has what its log tells."
    encoder, decoder, train = config.model.encoder, config.model.decoder, config.train
    frozen = "a frozen" if encoder.trainable == "none" else "a learning"
    return (
        f"A captioner with {frozen} <b>{for_html(encoder.name)}</b> encoder and the decoder"
        f" <b>{for_html(decoder.name)}</b>, trained on <b>{for_html(config.data.shards)}</b> by"
        f" <b>{'self-critical training' if train.objective == 'scst' else 'cross-entropy'}</b>."
    )


def _cards(run: RunArtifacts) -> str:
    epochs, losses = run.metric("epoch"), run.metric("loss")
    cards = []
    if epochs:
        step = max(epochs)
        train = run.config.train if run.config else None
        if train and train.steps:
            cards.append((f"steps of {train.steps:,} done, {epochs[step]:.3g} epochs", f"{step:,}"))
        else:
            wanted = f" of {train.epochs}" if train else ""
            cards.append((f"epochs{wanted} done, {step:,} steps", f"{epochs[step]:.3g}"))
    if losses:
        cards.append(("last loss of a step, nats per word", f"{losses[max(losses)]:.3f}"))
    if run.checkpoint and run.checkpoint.train_state.best_step and run.config:
        train_state = run.checkpoint.train_state
        judge = run.config.train.score_metric
        cards.append(
            (
                f"best validation {judge}, at step {train_state.best_step:,}",
                f"{100 * train_state.best_score:.1f}",
            )
        )
    for receipt in run.receipts[-1:]:
        metric = "CIDEr-D" if "CIDEr-D" in receipt.scores else list(receipt.scores)[-1]
        low, high = receipt.intervals[metric]
        about = f"{metric} of split {receipt.provenance.get('split', '?')}"
        about += f", 95 % interval {100 * low:.1f} to {100 * high:.1f}"
        cards.append((about, f"{100 * receipt.scores[metric]:.1f}"))
    shown = "".join(f"<div><b>{value}</b>{for_html(name)}</div>" for name, value in cards)
    return f'<div class="cards">{shown}</div>' if cards else ""


def _todo(run: RunArtifacts) -> str:
    """Say what is not there, and which command makes it."""
    lines = [for_html(text) for text in dict.fromkeys(run.missing)]
    if not run.receipts:
        split = run.config.data.val_split if run.config else "val"
        command = for_shell("captionscale", "score", str(run.folder), "--split", split)
        lines.append(
            "Not scored yet, so there is no score table and no best or worst caption:"
            f" <code>{for_html(command)}</code>, then this report again."
        )
    return "".join(f'<p class="todo">{line}</p>' for line in lines)


def _scores(ours: RunArtifacts, theirs: RunArtifacts | None) -> str:
    entries = [
        board.Entry(run.name, receipt)
        for run in (ours, theirs)
        if run is not None
        for receipt in run.receipts
    ]
    if not entries:
        return ""
    legend = (
        '<p class="legend">All figures are multiplied by 100; below each its 95&nbsp;% interval. BLEU: how'
        " many of a caption's words and phrases people also wrote about the image. METEOR: the same with"
        " synonyms. ROUGE-L: the longest sequence in common. CIDEr-D: the same phrases as people, rare ones"
        " counting more; it may pass 100. Scores on other references, or measured in another way, have a"
        " table of their own: they cannot be ranked together."
        f" {board.TIE}: the interval overlaps the best one's. What others have published on the same split"
        " stands below ours.</p>"
    )
    return legend + "\n".join(map(board.section, board.group_into_tables(entries)))


def _panels(run: RunArtifacts) -> str:
    if not run.receipts:
        return ""
    receipt = run.receipts[-1]
    flags = "".join(map(notice, board.warnings(receipt)))
    rows = [("", "the model", "people"), *diagnostics.rows(receipt.diagnostics)]
    return (
        "<p>A model can win a score without writing good captions: by endings such as <i>with a</i>, by"
        " saying words twice, by the same caption for many images. The model's captions of split"
        f" <b>{for_html(str(receipt.provenance.get('split', '?')))}</b> beside people's:</p>"
        f"{flags or '<p>Nothing suspicious was found.</p>'}{table(rows)}"
        '<p class="legend">Dangling: ending in such a word. 3-grams: three words in a row, said twice.'
        " Distinct: different captions for each caption. Novel, where it could be counted: not among the"
        " training captions. Words a caption: mean and standard deviation.</p>"
    )


def _captions(run: RunArtifacts) -> str:
    if run.receipts:
        receipt = run.receipts[-1]
        split = run.split(str(receipt.provenance.get("split")))
        step = receipt.provenance.get("step")
        saved = (
            run.try_load(lambda: open_checkpoint(run.folder, str(step)))
            if step in checkpoint_steps(run.folder)
            else None
        )
        same = saved is not None and saved.sha256 == receipt.hashes.get("model")
        groups, which = example_captions.select_examples(receipt), f"split {receipt.provenance.get('split')}"
    elif run.validations:
        step, path = max(run.validations.items())
        captions = run.try_load(lambda: read_results(path))
        if not captions or run.config is None:
            return ""
        split = run.split(run.config.data.val_split)
        saved = (
            run.try_load(lambda: open_checkpoint(run.folder, str(step)))
            if step in checkpoint_steps(run.folder)
            else None
        )
        same = saved is not None
        groups, which = example_captions.random_examples(captions), "the validation split, by greedy search"
    else:
        return ""
    about = f"Captions of {for_html(which)}, at step {step}."
    if split is None:
        about += " The shards are not at hand, so there are no images: say where they are by --shards."
    elif not same:
        about += " Their checkpoint is gone, or several runs wrote them: there is no attention to show."
    else:
        about += (
            " Each photograph is as the model saw it, and beside each word its probability, given the picture"
            " and the words before."
        )
        about += (
            f" The decoder '{run.config.model.decoder.name}' has no attention to draw."
            if run.config and run.config.model.decoder.name == "plain"
            else " The yellower a place, the more the model looked there for that word; the bluer, the less."
            " Words such as 'is' follow from those before, wherever it looked meanwhile."
        )
    body = run.try_load(lambda: example_captions.gallery(groups, run.config, split, saved if same else None))
    return f"<p>{about}</p>{body or ''}"


def _made(run: RunArtifacts) -> str:
    lines = []
    if run.config:
        with suppress(UserError):
            place = open_storage(run.shards or run.config.data.shards)
            rows = [("split", "images", "captions", "left out as unreadable")]
            for name, facts in read_manifest(place).splits.items():
                rows.append((name, f"{facts.images:,}", f"{facts.captions:,}", f"{facts.rejected:,}"))
            lines.append(f"<h3>Data: {for_html(str(place))}</h3>" + table(rows))
    known: list[tuple[str, str]] = []
    if run.checkpoint:
        known += [
            ("checkpoint", run.checkpoint.folder.name),
            ("sha256 of its weights", run.checkpoint.sha256),
        ]
    for receipt in run.receipts[-1:]:
        flat = toml.flatten(receipt.environment)
        known += [(f"scored: {key}", str(value)) for key, value in flat.items()]
        known.append(("measured with", receipt.signature))
    if known:
        lines.append("<h3>Environment</h3>" + table([("", "what it was"), *known], text=True))
    if run.config:
        lines.append(
            f"<h3>Settings</h3><details><summary>All of them, defaults included</summary>"
            f"<pre>{for_html(toml.dumps(run.config))}</pre></details>"
        )
    return "\n".join(lines)
