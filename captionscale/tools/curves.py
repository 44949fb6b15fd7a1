"""The curves of a report, as inline SVG that is legible on light and dark backgrounds."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from captionscale.escape import for_terminal
from captionscale.html import render
from captionscale.progress import progress
from captionscale.score import intervals
from captionscale.score.metrics import Evaluator
from captionscale.score.results import read_results
from captionscale.tools.run_artifacts import RunArtifacts

_INK = "#010203"  # replaced by the page's text color
# Okabe and Ito, "Color Universal Design", 2008: distinguishable with and without color-vision deficiency.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "D", "s", "^")
_INCHES = (4.6, 2.7)
_MARKERS_UP_TO = 40
_OFFSET = 0.02

_Scores = Mapping[int, Mapping[str, float]]  # of each metric by step
# Title and unit of each log key that is drawn if present.
_TITLES = {
    "loss": ("Loss", "nats per word"),
    "lr": ("Learning rate", "of the decoder"),
    "images_per_s": ("Throughput", "images per second"),
    "reward": ("Reward of sampled captions", "reward"),
    "dangling": ("Sampled captions that end in 'a', 'with' or the like", "share"),
    "distinct": ("Different captions among the sampled ones", "share"),
}


class _Series(NamedTuple):
    """Values by step, and the bounds of an interval at some steps."""

    name: str
    values: Mapping[int, float]
    intervals: Mapping[int, tuple[float, float]] = {}
    line: bool = True


class _Curve(NamedTuple):
    title: str
    alt: str
    svg: Markup  # without the start of its tag, to which the page adds the alternative text


def curves(run: RunArtifacts) -> Markup:
    """Return the curves of a run's log, and its scores with their intervals, as HTML."""
    drawn = []
    for key, (title, unit) in _TITLES.items():
        if found := run.metric(key):
            first, last = min(found), max(found)
            alt = f"{title}, {unit}: {found[first]:.4g} at step {first}, {found[last]:.4g} at step {last}"
            drawn.append(_Curve(title, alt, _draw(title, unit, [_Series(key, found)])))
    scores = run.log.scores if run.log else {}
    bounds = _intervals(run, scores) if scores else {}
    for metric in dict.fromkeys(metric for values in scores.values() for metric in values):
        found = {step: 100 * values[metric] for step, values in scores.items() if metric in values}
        series = [_Series("validation, greedy", found, bounds.get(metric, {}))]
        for receipt in run.receipts:
            step, split = receipt.provenance.get("step"), receipt.provenance.get("split")
            if metric in receipt.scores and isinstance(step, int):
                value, (low, high) = {step: 100 * receipt.scores[metric]}, receipt.intervals[metric]
                name, bars = f"split {split}, by its receipt", {step: (100 * low, 100 * high)}
                series.append(_Series(name, value, bars, line=False))
        best = max(found, key=found.__getitem__)
        alt = f"validation {metric} times 100: best of {len(found)} is {found[best]:.1f} at step {best}"
        drawn.append(_Curve(metric, alt, _draw(metric, f"{metric} × 100", series)))
    if not drawn:
        return Markup()
    verdict, has_intervals = _verdict(run, scores), bool(bounds or run.receipts)
    return render("report_curves.html", verdict=verdict, curves=drawn, has_intervals=has_intervals)


def _draw(title: str, unit: str, series: Sequence[_Series]) -> Markup:
    """Return one figure over the steps of a run."""
    # A notebook sets this for its children, in which its backend cannot be imported.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text stays text, and two figures of a page share no id.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        last = max(step for each in series for step in each.values)
        for number, each in enumerate(series):
            steps, color = sorted(each.values), _COLORS[number % len(_COLORS)]
            marker = _MARKERS[number % len(_MARKERS)] if len(steps) <= _MARKERS_UP_TO else ""
            # Bars of one step would hide each other.
            offset = number * _OFFSET * last
            style: dict[str, Any] = {"marker": marker, "markersize": 4, "color": color}
            x, y = [step + offset for step in steps], [each.values[step] for step in steps]
            axes.plot(x, y, "-" if each.line else "", label=for_terminal(each.name), **style)
            for step, (low, high) in each.intervals.items():
                axes.plot([step + offset] * 2, [low, high], color=color, linewidth=2.5, alpha=0.6)
        axes.set_xlim(0, last * (1 + _OFFSET * (len(series) + 1)))
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
    return Markup(file.getvalue().replace(_INK, "currentColor").partition("<svg ")[2])


def _best_and_last(scores: _Scores, metric: str) -> list[int]:
    """Return the steps of the best and of the last validation, which can be the same."""
    found = {step: values[metric] for step, values in scores.items() if metric in values}
    return [max(found, key=found.__getitem__), max(found)] if found else []


def _verdict(run: RunArtifacts, scores: _Scores) -> str:
    """Return whether the validation score was still rising."""
    if not scores or run.config is None:
        return ""
    metric, patience = run.config.train.score_metric, run.config.train.patience
    found = _best_and_last(scores, metric)
    if len(scores) < 2 or not found:
        return f"{len(scores)} validations are too few to show whether {metric} still rises."
    best, last = found
    if best == last:
        return f"{metric} was best at the last validation: more epochs may improve it."
    since = sum(step > best for step in scores)
    return (
        f"{metric} was best at step {best:,}; the {since} validations since then were no better"
        f" (training stops after {patience} such validations)."
    )


def _intervals(run: RunArtifacts, scores: _Scores) -> dict[str, dict[int, tuple[float, float]]]:
    """Return by metric and step the 95 % intervals of the best and the last validation."""
    # To score the captions of every validation would take as long as it did in training.
    if run.config is None:
        return {}
    chosen = _best_and_last(scores, run.config.train.score_metric)
    files = {step: path for step, path in run.validations.items() if step in chosen}
    split = run.split(run.config.data.val_split) if files else None
    if split is None:
        return {}
    found: dict[str, dict[int, tuple[float, float]]] = {}

    def measure() -> None:
        references = split.references()
        with Evaluator() as evaluator, progress("intervals of validation", len(files), transient=True) as bar:
            for step, path in files.items():
                metrics = [metric for metric in scores[step] if metric != "METEOR"]
                measured = evaluator.measure(read_results(path), references, metrics)
                resampled = intervals.bootstrap_scores(measured.statistics, measured.metrics)
                for metric, figures in zip(metrics, resampled.values(), strict=True):
                    low, high = intervals.interval(figures)
                    found.setdefault(metric, {})[step] = (100 * low, 100 * high)
                bar.advance()

    run.try_load(measure)
    return found
