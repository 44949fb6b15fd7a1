"""Curves of a run, as SVG that stands in a page, legible on light and on dark."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from captionscale.escape import for_html, for_terminal
from captionscale.progress import progress
from captionscale.score import intervals
from captionscale.score.metrics import Evaluator
from captionscale.score.results import read_results
from captionscale.tools.run_artifacts import RunArtifacts

_INK = "#010203"
"""What is drawn in it has the page's own colour of letters in the end."""
# Okabe and Ito, "Color Universal Design", 2008: told apart with and without colour-vision deficiency.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKS = ("o", "D", "s", "^")
_INCHES = (4.6, 2.7)
_DOTS_UP_TO = 40
_ASIDE = 0.02

_PLAINLY = {
    "loss": ("Loss", "nats per word"),
    "lr": ("Learning rate", "of the decoder"),
    "images_per_s": ("Throughput", "images per second"),
    "reward": ("Reward of sampled captions", "reward"),
    "dangling": ("Sampled captions that end in 'a', 'with' or the like", "share"),
    "distinct": ("Different captions among the sampled ones", "share"),
}
"""What is drawn of the log if it is there: title and unit."""


class _Points(NamedTuple):
    """A curve: figures by step, and of some of them the bounds of an interval."""

    name: str
    figures: Mapping[int, float]
    intervals: Mapping[int, tuple[float, float]] = {}
    joined: bool = True


def _curve(title: str, unit: str, series: Sequence[_Points], said: str) -> str:
    """Return a picture of one figure over the steps of a run, as inline SVG.

    Args:
        title: What is drawn.
        unit: Of the figures.
        series: One curve or several.
        said: The same in words, for who cannot see it.
    """
    # A notebook names its own backend here for all that it starts, and without that one there is no import.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Letters stay letters; two pictures of a page share no id.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        last = max(step for points in series for step in points.figures)
        for number, points in enumerate(series):
            colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
            # Bars of one step would hide each other.
            aside = number * _ASIDE * last
            steps = sorted(points.figures)
            places, heights = [step + aside for step in steps], [points.figures[step] for step in steps]
            dots = mark if len(steps) <= _DOTS_UP_TO else ""
            line = "-" if points.joined else ""
            axes.plot(
                places,
                heights,
                line,
                marker=dots,
                color=colour,
                label=for_terminal(points.name),
                markersize=4,
            )
            for step, (low, high) in points.intervals.items():
                axes.plot([step + aside] * 2, [low, high], color=colour, linewidth=2.5, alpha=0.6)
        axes.set_xlim(0, last * (1 + _ASIDE * (len(series) + 1)))
        axes.set_xlabel("step", color=_INK)
        axes.set_ylabel(for_terminal(unit), color=_INK)
        axes.tick_params(colors=_INK)
        axes.ticklabel_format(axis="x", style="plain")
        axes.grid(color="#808080", alpha=0.25)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=_INK, fontsize="small")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace(_INK, "currentColor")
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{for_html(said)}" ', 1)
    return f"<figure class=curve><figcaption>{for_html(title)}</figcaption>{svg}</figure>"


def curves(run: RunArtifacts) -> str:
    """Return the curves of a run's log, and its scores with their intervals, as HTML."""
    drawn = []
    for key, (title, unit) in _PLAINLY.items():
        if found := run.metric(key):
            first, last = min(found), max(found)
            said = f"{title}, {unit}: {found[first]:.4g} at step {first}, {found[last]:.4g} at step {last}"
            drawn.append(_curve(title, unit, [_Points(key, found)], said))
    scores = run.log.scores if run.log else {}
    bounds = _intervals(run, scores) if scores else {}
    for metric in dict.fromkeys(metric for values in scores.values() for metric in values):
        found = {step: 100 * values[metric] for step, values in scores.items() if metric in values}
        series = [_Points("validation, greedy", found, bounds.get(metric, {}))]
        for receipt in run.receipts:
            step, split = receipt.provenance.get("step"), receipt.provenance.get("split")
            if metric in receipt.scores and isinstance(step, int):
                low, high = receipt.intervals[metric]
                name, score = f"split {split}, by its receipt", 100 * receipt.scores[metric]
                bars = {step: (100 * low, 100 * high)}
                series.append(_Points(name, {step: score}, bars, joined=False))
        best = max(found, key=found.__getitem__)
        said = f"validation {metric} times 100: best of {len(found)} is {found[best]:.1f} at step {best}"
        drawn.append(_curve(metric, f"{metric} × 100", series, said))
    if not drawn:
        return ""
    verdict = _verdict(run, scores)
    legend = (
        "Bars: 95 % intervals by bootstrap over images, of the best and the last validation and of receipts;"
        " those of one step stand side by side."
        if bounds or run.receipts
        else ""
    )
    return f'<p>{verdict}</p><div class="curves">{"".join(drawn)}</div><p class="legend">{legend}</p>'


def _best_and_last(scores: dict[int, dict[str, float]], metric: str) -> list[int]:
    """Return the steps of the best validation and of the last one, which may be the same."""
    found = {step: values[metric] for step, values in scores.items() if metric in values}
    return [max(found, key=found.__getitem__), max(found)] if found else []


def _verdict(run: RunArtifacts, scores: dict[int, dict[str, float]]) -> str:
    """Say whether scores were still rising."""
    if not scores or run.config is None:
        return ""
    metric = run.config.train.score_metric
    telling = _best_and_last(scores, metric)
    if len(scores) < 2 or not telling:
        return f"Too few validations ({len(scores)}) to tell whether {for_html(metric)} still rises."
    best, last = telling
    if best == last:
        return f"{for_html(metric)} was best at the last validation: a run of more epochs may come further."
    since = sum(step > best for step in scores)
    return (
        f"{for_html(metric)} was best at step {best:,}; the {since} validations since were no better"
        f" (training stops after {run.config.train.patience} such)."
    )


def _intervals(
    run: RunArtifacts, scores: dict[int, dict[str, float]]
) -> dict[str, dict[int, tuple[float, float]]]:
    """Return the 95 % intervals of the best and of the last validation, by the captions that are kept.

    The log has none, and to score all captions again would take as long as it did in training.
    """
    if run.config is None:
        return {}
    telling = _best_and_last(scores, run.config.train.score_metric)
    files = {step: path for step, path in run.validations.items() if step in telling}
    split = run.split(run.config.data.val_split) if files else None
    if split is None:
        return {}
    found: dict[str, dict[int, tuple[float, float]]] = {}

    def measure() -> None:
        references = split.references()
        with Evaluator() as evaluator, progress("intervals of validation", len(files), transient=True) as bar:
            for step, path in files.items():
                metrics = [metric for metric in scores[step] if metric != "METEOR"]
                rows = evaluator.measure(read_results(path), references, metrics).statistics
                for metric, figures in intervals.bootstrap_scores(rows, metrics).items():
                    low, high = intervals.interval(figures)
                    found.setdefault(metric, {})[step] = (100 * low, 100 * high)
                bar.advance()

    run.try_load(measure)
    return found
