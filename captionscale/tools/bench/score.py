"""`captionscale bench score`: the evaluator beside pycocoevalcap's own classes, on the same cores."""

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count, cycle, islice
from pathlib import Path
from random import Random
from threading import Event

import numpy as np
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captionscale.data import synthetic
from captionscale.data.sources import coco
from captionscale.errors import UserError
from captionscale.files import cpu_count
from captionscale.progress import say
from captionscale.score import bleu, ciderd, java, rouge
from captionscale.score.metrics import METRICS, Evaluator, MetricScores, Scores, measure, pycocoevalcap_scores
from captionscale.score.results import read_results
from captionscale.score.tokenizer import LINE_BREAKS
from captionscale.tools.bench.race import Heat, Sheet, Way, race

_LOOK_S = 0.02

Texts = dict[int, list[str]]
Found = dict[str, MetricScores]


def bench(results: Path | None, references: Path | None, *, count: int, rounds: int) -> list[Heat | Sheet]:
    """Measure scoring, and prove that both ways find the same.

    Args:
        results: COCO results; None: sentences about drawn scenes, for which `references` is not read.
        references: COCO captions of the same images.
        count: Images of the drawn scenes.
        rounds: Of each table.

    Raises:
        UserError: One file without the other, files of another layout, or figures that differ.
    """
    if (results is None) != (references is None):
        raise UserError("bench score: found one of --captions and --references, wanted both or neither")
    if results is None or references is None:
        say("note: sentences about drawn scenes, of few words; give --captions and --references for yours")
        captions, human = _drawn(count)
    else:
        captions, human = read_results(results), coco.read_references(references)
    # What their tokenizer takes for a line end would move their captions to other images.
    captions = {image: LINE_BREAKS.sub(" ", captions[image]) for image in sorted(captions)}
    human = {image: [LINE_BREAKS.sub(" ", text) for text in human[image]] for image in captions}
    # Their wrappers take the first Java there is.
    os.environ["PATH"] = os.pathsep.join((str(Path(java.find_java()).parent), os.environ["PATH"]))
    return [
        _n_grams(captions, human, rounds),
        _warm(captions, human, rounds),
        _cold(captions, human, rounds),
        _scaling(captions, human),
    ]


def _drawn(images: int) -> tuple[dict[int, str], Texts]:
    chance = Random(0)
    alone, pairs = synthetic.all_scenes()
    shown = islice(cycle(chance.sample(alone + pairs, len(alone + pairs))), images)
    written = {
        image: [synthetic.captions(scene, chance) for _ in range(2)] for image, scene in enumerate(shown)
    }
    return {image: other[0] for image, (_, other) in written.items()}, {
        image: texts for image, (texts, _) in written.items()
    }


def _n_grams(captions: Mapping[int, str], human: Texts, rounds: int) -> Heat:
    """BLEU, ROUGE-L and CIDEr-D of tokenized texts, by one thread each."""
    targets, found = _their_tokens(human), _their_tokens({image: [text] for image, text in captions.items()})
    pairs = deque((found[image][0], group) for image, group in targets.items())
    ours: Found = {}
    theirs: Found = {}
    turns = count(1)

    def kernels() -> None:
        # In another order each time: texts that are the same as those before would not be read again.
        pairs.rotate(-1)
        turned = next(turns)
        candidates, references = [caption for caption, _ in pairs], [group for _, group in pairs]
        rows = bleu.statistics(candidates, references)
        table = zip(bleu.corpus_score(rows.sum(0)), bleu.corpus_score(rows).T, strict=True)
        for n, (value, figures) in enumerate(table, 1):
            ours[f"BLEU-{n}"] = value, np.roll(figures, turned).tolist()
        for metric, figures in (
            ("ROUGE-L", rouge.rouge_l(candidates, references)),
            ("CIDEr-D", ciderd.cider_d(candidates, references)),
        ):
            ours[metric] = figures.mean(), np.roll(figures, turned).tolist()

    ways = [
        Way("captionscale", kernels, len(captions)),
        Way("pycocoevalcap", lambda: theirs.update(pycocoevalcap_scores(found, targets)), len(captions)),
    ]
    heat = race("BLEU, ROUGE-L and CIDEr-D of tokenized captions", "images", ways, rounds)
    heat.notes.append(_same(ours, theirs))
    return heat


def _warm(captions: Mapping[int, str], human: Texts, rounds: int) -> Heat:
    """All metrics of captions that come again and again for the same images, as in a training run."""
    ours: list[Scores] = []
    theirs: Found = {}
    meteor = Meteor()
    targets = _their_tokens(human)
    with Evaluator() as evaluator:
        ways = [
            Way("captionscale, warm", lambda: ours.append(evaluator.measure(captions, human)), len(captions)),
            Way("pycocoevalcap", lambda: theirs.update(_theirs(captions, human)), len(captions)),
            Way(
                "pycocoevalcap, METEOR warm and references tokenized",
                lambda: _theirs(captions, human, meteor, targets),
                len(captions),
            ),
        ]
        heat = race("All metrics, in a training run", "images", ways, rounds)
    heat.notes.append(_same(_figures(ours[-1]), theirs))
    return heat


def _cold(captions: Mapping[int, str], human: Texts, rounds: int) -> Heat:
    """All metrics, once: each way starts its own JVMs."""
    ours: list[Scores] = []
    theirs: Found = {}
    ways = [
        Way("captionscale", lambda: ours.append(measure(captions, human)), len(captions)),
        Way("pycocoevalcap", lambda: theirs.update(_theirs(captions, human)), len(captions)),
    ]
    heat = race("All metrics, once", "images", ways, rounds)
    peaks = [_peak_mb(way.run) for way in ways]
    heat.notes += [
        _same(_figures(ours[-1]), theirs),
        f"Memory of all JVMs together, at most: {peaks[0]:,.0f} MB, pycocoevalcap's {peaks[1]:,.0f} MB.",
    ]
    return heat


def _scaling(captions: Mapping[int, str], human: Texts) -> Sheet:
    """All metrics on some of the cores."""
    own = os.sched_getaffinity(0)
    sheet = Sheet("All metrics by cores", ["cores", "once, s", "warm, s", "JVMs, warm, MB"], [])
    for some in sorted({min(2**n, cpu_count()) for n in range(5)}):
        os.sched_setaffinity(0, set(sorted(own)[:some]))
        with Evaluator() as evaluator:
            once = _seconds(lambda: measure(captions, human))
            # Java compiles what it runs often: the third time counts.
            warm = [_seconds(lambda: evaluator.measure(captions, human)) for _ in range(3)][-1]
            sheet.rows.append((some, round(once, 1), round(warm, 1), round(_peak_mb(lambda: None))))
        os.sched_setaffinity(0, own)
    return sheet


def _theirs(
    captions: Mapping[int, str], human: Texts, meteor: Meteor | None = None, targets: Texts | None = None
) -> Found:
    """Score as `COCOEvalCap.evaluate` does, but for SPICE; what is given is not made again."""
    targets = targets or _their_tokens(human)
    found = _their_tokens({image: [text] for image, text in captions.items()})
    # Before BLEU, beside which it loads its table.
    meteor = meteor or Meteor()
    figures = pycocoevalcap_scores(found, targets)
    return figures | {"METEOR": meteor.compute_score(targets, found)}


def _their_tokens(texts: Texts) -> Texts:
    with _quiet():
        tokens: Texts = PTBTokenizer().tokenize(
            {image: [{"caption": text} for text in group] for image, group in texts.items()}
        )
    return tokens


@contextmanager
def _quiet() -> Iterator[None]:
    """Let nothing be said on stderr, by children either: their tokenizer would, into the progress bar."""
    told = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(told, 2)
        os.close(told)


def _figures(scores: Scores) -> Found:
    return {metric: (scores.values[metric], scores.per_image[metric]) for metric in METRICS}


def _same(ours: Found, theirs: Found) -> str:
    """Say how close both are.

    Raises:
        UserError: Not to 1e-12.
    """
    gap = max(
        float(np.abs(np.subtract([ours[metric][0], *ours[metric][1]], [value, *per_image])).max())
        for metric, (value, per_image) in theirs.items()
    )
    if not gap <= 1e-12:
        raise UserError(
            f"bench score: figures differ from pycocoevalcap's by {gap:.1e}, wanted 1e-12; report it"
        )
    return f"All figures of the corpus and of each image are equal to {max(gap, 1e-16):.0e}."


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_mb(run: Callable[[], object]) -> float:
    """Return the most memory that all JVMs had together while something ran."""
    done = Event()

    def look() -> float:
        peak = 0.0
        while True:
            peak = max(peak, sum(map(_resident_mb, _jvms())))
            if done.wait(_LOOK_S):
                return peak

    with ThreadPoolExecutor(1) as thread:
        peak = thread.submit(look)
        try:
            run()
        finally:
            done.set()
        return peak.result()


def _jvms() -> list[Path]:
    found = []
    for thread in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            children = [Path("/proc", child) for child in thread.read_text().split()]
            found += [child for child in children if (child / "comm").read_text() == "java\n"]
    return found


def _resident_mb(process: Path) -> float:
    with suppress(OSError):
        for line in (process / "status").read_text().splitlines():
            # The most that it ever had: what it gave back between two looks counts.
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1.024e-3
    return 0
