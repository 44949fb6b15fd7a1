"""Scoring with all metrics: captionscale's evaluator and pycocoevalcap's own classes.

Measured gains (docs/performance.md): BLEU, ROUGE-L and CIDEr-D of tokenized captions 43 times as fast, all
metrics 5.3 times as fast during training and 1.6 times as fast once.
"""

import argparse
import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count, cycle, islice
from pathlib import Path
from random import Random
from threading import Event

import numpy as np
import psutil
from comparison import Candidate, Table, compare, run
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captionscale.data import synthetic
from captionscale.data.sources import coco
from captionscale.errors import UserError
from captionscale.machine import cpu_count
from captionscale.progress import say
from captionscale.score import bleu, ciderd, java, rouge
from captionscale.score.metrics import METRICS, Evaluator, MetricScores, Scores, measure, pycocoevalcap_scores
from captionscale.score.results import read_results
from captionscale.score.tokenizer import LINE_BREAKS

_POLL_S = 0.02
_TOLERANCE = 1e-12

Texts = dict[int, list[str]]
Figures = dict[str, MetricScores]


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Run the benchmark; return its tables."""
    parser = argparse.ArgumentParser("score.py", description="Scoring with all metrics.")
    parser.add_argument("--captions", type=Path, metavar="RESULTS", help="COCO results (default: synthetic)")
    parser.add_argument(
        "--references", type=Path, metavar="CAPTIONS", help="COCO captions of the same images"
    )
    parser.add_argument("--count", type=int, metavar="N", help="synthetic images (default: 5000)")
    return run(
        _measure,
        parser,
        arguments,
        full={"count": 5000, "rounds": 5, "jvms": True},
        quick={"count": 500, "rounds": 1, "jvms": True},
        tiny={"count": 20, "rounds": 1, "jvms": False},
    )


def _measure(options: argparse.Namespace) -> Iterator[Table]:
    if (options.captions is None) != (options.references is None):
        raise UserError("found one of --captions and --references, expected both or neither; name both")
    if options.captions is None:
        say("note: synthetic captions of few words; use --captions and --references for yours")
        captions, references = _synthetic(options.count)
    else:
        captions, references = read_results(options.captions), coco.read_references(options.references)
    # Their tokenizer would take these for line ends, and move captions to other images.
    captions = {image: LINE_BREAKS.sub(" ", captions[image]) for image in sorted(captions)}
    references = {image: [LINE_BREAKS.sub(" ", text) for text in references[image]] for image in captions}
    # Their wrappers use the first Java on the path.
    os.environ["PATH"] = os.pathsep.join((str(Path(java.find_java()).parent), os.environ["PATH"]))
    yield _n_grams(captions, references, options.rounds)
    if options.jvms:
        yield _warm(captions, references, options.rounds)
        yield _cold(captions, references, options.rounds)
        yield _scaling(captions, references)


def _synthetic(images: int) -> tuple[dict[int, str], Texts]:
    random = Random(0)
    alone, pairs = synthetic.all_scenes()
    scenes = islice(cycle(random.sample(alone + pairs, len(alone + pairs))), images)
    texts = [[synthetic.captions(scene, random) for _ in range(2)] for scene in scenes]
    captions = {image: other[0] for image, (_, other) in enumerate(texts)}
    return captions, {image: human for image, (human, _) in enumerate(texts)}


def _n_grams(captions: Mapping[int, str], references: Texts, rounds: int) -> Table:
    """Compare BLEU, ROUGE-L and CIDEr-D of tokenized captions, in one thread each."""
    targets = _their_tokens(references)
    found = _their_tokens({image: [text] for image, text in captions.items()})
    pairs = deque((found[image][0], group) for image, group in targets.items())
    ours: Figures = {}
    theirs: Figures = {}
    turns = count(1)

    def kernels() -> None:
        # In another order each time: texts equal to those before would not be read again.
        pairs.rotate(-1)
        turned = next(turns)
        candidates, groups = [caption for caption, _ in pairs], [group for _, group in pairs]
        rows = bleu.statistics(candidates, groups)
        scores = zip(bleu.corpus_score(rows.sum(0)), bleu.corpus_score(rows).T, strict=True)
        for n, (value, figures) in enumerate(scores, 1):
            ours[f"BLEU-{n}"] = value, np.roll(figures, turned).tolist()
        for metric, figures in (
            ("ROUGE-L", rouge.rouge_l(candidates, groups)),
            ("CIDEr-D", ciderd.cider_d(candidates, groups)),
        ):
            ours[metric] = figures.mean(), np.roll(figures, turned).tolist()

    candidates = [
        Candidate("captionscale", kernels, len(captions)),
        Candidate(
            "pycocoevalcap", lambda: theirs.update(pycocoevalcap_scores(found, targets)), len(captions)
        ),
    ]
    table = compare("BLEU, ROUGE-L and CIDEr-D of tokenized captions", "images", candidates, rounds)
    table.notes.append(_check_equal(ours, theirs))
    return table


def _warm(captions: Mapping[int, str], references: Texts, rounds: int) -> Table:
    """Compare all metrics of captions of the same images again and again, as in a training run."""
    ours: list[Scores] = []
    theirs: Figures = {}
    meteor = Meteor()
    targets = _their_tokens(references)
    with Evaluator() as evaluator:
        candidates = [
            Candidate(
                "captionscale, warm",
                lambda: ours.append(evaluator.measure(captions, references)),
                len(captions),
            ),
            Candidate("pycocoevalcap", lambda: theirs.update(_theirs(captions, references)), len(captions)),
            Candidate(
                "pycocoevalcap, METEOR warm and references tokenized",
                lambda: _theirs(captions, references, meteor, targets),
                len(captions),
            ),
        ]
        table = compare("All metrics, in a training run", "images", candidates, rounds)
    table.notes.append(_check_equal(_figures(ours[-1]), theirs))
    return table


def _cold(captions: Mapping[int, str], references: Texts, rounds: int) -> Table:
    """Compare all metrics, once: each candidate starts its own JVMs."""
    ours: list[Scores] = []
    theirs: Figures = {}
    candidates = [
        Candidate("captionscale", lambda: ours.append(measure(captions, references)), len(captions)),
        Candidate("pycocoevalcap", lambda: theirs.update(_theirs(captions, references)), len(captions)),
    ]
    table = compare("All metrics, once", "images", candidates, rounds)
    peaks = [_peak_mb(candidate.run) for candidate in candidates]
    table.notes += [
        _check_equal(_figures(ours[-1]), theirs),
        f"Peak memory of all JVMs together: {peaks[0]:,.0f} MB, pycocoevalcap's {peaks[1]:,.0f} MB.",
    ]
    return table


def _scaling(captions: Mapping[int, str], references: Texts) -> Table:
    own = os.sched_getaffinity(0)
    table = Table("All metrics by cores", ["cores", "once, s", "warm, s", "JVMs, warm, MB"])
    for some in sorted({min(2**n, cpu_count()) for n in range(5)}):
        os.sched_setaffinity(0, set(sorted(own)[:some]))
        with Evaluator() as evaluator:
            once = _seconds(lambda: measure(captions, references))
            # Java compiles what runs often: the third time counts.
            warm = [_seconds(lambda: evaluator.measure(captions, references)) for _ in range(3)][-1]
            table.rows.append((some, round(once, 1), round(warm, 1), round(_peak_mb(lambda: None))))
        os.sched_setaffinity(0, own)
    return table


def _theirs(
    captions: Mapping[int, str], references: Texts, meteor: Meteor | None = None, targets: Texts | None = None
) -> Figures:
    """Score as `COCOEvalCap.evaluate` does, except for SPICE; `meteor` and `targets` are reused if given."""
    targets = targets or _their_tokens(references)
    found = _their_tokens({image: [text] for image, text in captions.items()})
    # Before BLEU, so that its table is loaded meanwhile.
    meteor = meteor or Meteor()
    figures = pycocoevalcap_scores(found, targets)
    return figures | {"METEOR": meteor.compute_score(targets, found)}


def _their_tokens(texts: Texts) -> Texts:
    with _silent_stderr():
        tokens: Texts = PTBTokenizer().tokenize(
            {image: [{"caption": text} for text in group] for image, group in texts.items()}
        )
    return tokens


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence stderr, of child processes too: their tokenizer would write into the progress bar."""
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _figures(scores: Scores) -> Figures:
    return {metric: (scores.values[metric], scores.per_image[metric]) for metric in METRICS}


def _check_equal(ours: Figures, theirs: Figures) -> str:
    gap = max(
        float(np.abs(np.subtract([ours[metric][0], *ours[metric][1]], [value, *per_image])).max())
        for metric, (value, per_image) in theirs.items()
    )
    if not gap <= _TOLERANCE:
        raise UserError(
            f"scores differ from pycocoevalcap's by {gap:.1e}, expected {_TOLERANCE:g}; please report this"
        )
    return f"All scores of the corpus and of each image are equal to {max(gap, 1e-16):.0e}."


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_mb(run: Callable[[], object]) -> float:
    """Return the peak memory of all JVMs together during a run."""
    done = Event()

    def watch() -> float:
        peak = 0.0
        while True:
            peak = max(peak, sum(map(_peak_rss_mb, psutil.Process().children())))
            if done.wait(_POLL_S):
                return peak

    with ThreadPoolExecutor(1) as thread:
        peak = thread.submit(watch)
        try:
            run()
        finally:
            done.set()
        return peak.result()


def _peak_rss_mb(process: psutil.Process) -> float:
    with suppress(psutil.Error, OSError):
        if process.name() == "java":
            status = Path(f"/proc/{process.pid}/status").read_text()
            # The peak, as psutil has none: memory given back between two polls counts.
            return int(status.partition("VmHWM:")[2].split()[0]) * 1.024e-3
    return 0.0


if __name__ == "__main__":
    main()
