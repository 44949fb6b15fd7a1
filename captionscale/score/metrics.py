"""Score captions against references, digit for digit as the COCO leaderboard does.

Source:
    Chen et al. 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server" (arXiv:1504.00325);
    its code is the package pycocoevalcap.  BLEU, ROUGE-L and CIDEr-D are its own classes.  Its PTB tokeniser
    and METEOR are Java programs, which we start ourselves: its wrappers write into site-packages, hang when
    Java dies, and move captions to other images when one of them holds a line separator.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer import ptbtokenizer

from captionscale.errors import UserError, did_you_mean
from captionscale.score import java

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")

# What the tokeniser takes for a line end or for nothing at all, and halves of emoji, which no file can hold.
BREAKS = re.compile(r"[\s\x00-\x1f\x7f\ud800-\udfff]+")

# For each image its tokenised texts, and of each metric the corpus figure and those of the images.
Texts = dict[int, list[str]]
Figures = tuple[float, Sequence[float]]


@dataclass(frozen=True)
class Scores:
    """What `score` found.

    Attributes:
        values: The corpus figure of each metric, 0 to 1 (CIDEr-D: 0 to 10).
        image_ids: The images, in ascending order.
        per_image: The figures of each metric for each image, in the order of `image_ids`.
    """

    values: dict[str, float]
    image_ids: list[int]
    per_image: dict[str, list[float]]


def tokenise(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Split captions into words as the Penn Treebank does, in lower case and without punctuation.

    Args:
        captions: For each image its captions; an empty caption stays an empty one.

    Returns:
        The same captions in the same places, their words parted by one space.

    Raises:
        UserError: The tokeniser failed, or there is no Java.

    Source:
        Stanford CoreNLP 3.4.1 with the flags and the punctuation list of pycocoevalcap.  All separators and
        control characters become a space first, so that each caption is one line and stays at its image.
    """
    lines = [BREAKS.sub(" ", caption).strip() for group in captions.values() for caption in group]
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    with java.start("PTB tokeniser", *command, timeout_s=_deadline(len(lines))) as jvm:
        tokenised = iter(jvm.ask(lines, len(lines), last=True))
    return {
        image_id: [_without_punctuation(next(tokenised)) for _ in group]
        for image_id, group in captions.items()
    }


def score(
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    metrics: Sequence[str] = METRICS,
) -> Scores:
    """Score one caption for each image against what people wrote about it.

    The order of the images does not matter.  An empty caption scores 0, but ROUGE-L gives it 1 where a
    reference has no word either; a lone image has a CIDEr-D of 0, since no word is rarer than another.

    Args:
        captions: The caption of each image.
        references: The human captions of each image, any number from one up.
        metrics: Which of `METRICS` to compute; METEOR takes a Java process with 2 GB of memory.

    Returns:
        The figures over all images and for each one.

    Raises:
        UserError: The images of both differ, or there are none, an image has no reference, no reference has a
            word, a metric is unknown, or a Java program failed.
    """
    _check(captions, references, metrics)
    # Sorted, because a sum of floats depends on its order.
    image_ids = sorted(references)
    tokenised = tokenise({image_id: [captions[image_id], *references[image_id]] for image_id in image_ids})
    candidates = {image_id: texts[:1] for image_id, texts in tokenised.items()}
    targets = {image_id: texts[1:] for image_id, texts in tokenised.items()}
    if not any(map(any, targets.values())):
        raise UserError(
            f"score: found no word in the references of {len(image_ids)} images, wanted sentences;"
            " give the human captions as references"
        )
    # METEOR first: it is the one that can fail.
    results = _meteor(targets, candidates) if "METEOR" in metrics else {}
    results |= _n_gram_metrics(targets, candidates, metrics)
    return Scores(
        values={metric: float(results[metric][0]) for metric in metrics},
        image_ids=image_ids,
        per_image={metric: [float(figure) for figure in results[metric][1]] for metric in metrics},
    )


def _check(
    captions: Collection[int], references: Mapping[int, Sequence[str]], metrics: Sequence[str]
) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"score: unknown metric {metric!r}; {did_you_mean(metric, METRICS)}")
    faults = {
        "without a caption": references.keys() - captions,
        "not among the references": set(captions) - references.keys(),
        "without a reference": [image_id for image_id, texts in references.items() if not texts],
        "with one bare text for a list of references": [
            image_id for image_id, texts in references.items() if isinstance(texts, str)
        ],
    }
    found = ", ".join(f"{_some(ids)} {fault}" for fault, ids in faults.items() if ids)
    if found or not references:
        raise UserError(
            f"score: found {found or 'no images at all'}; wanted one caption and at least one reference for"
            " each image; give both for the same split"
        )


def _some(ids: Collection[int]) -> str:
    first = ", ".join(map(str, sorted(ids)[:3]))
    return f"{len(ids)} image{'s' * (len(ids) > 1)} ({first}{', ...' * (len(ids) > 3)})"


def _without_punctuation(line: str) -> str:
    return " ".join(word for word in line.rstrip().split(" ") if word not in ptbtokenizer.PUNCTUATIONS)


def _deadline(texts: int) -> float:
    # METEOR took 10 s to load its table and 4 ms an image on 2 cores; a busy node may be ten times slower.
    return 300 + 0.05 * texts


def _n_gram_metrics(targets: Texts, candidates: Texts, metrics: Sequence[str]) -> dict[str, Figures]:
    # Imported here: they load numpy and the Python debugger.
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    results: dict[str, Figures] = {}
    if any(metric.startswith("BLEU") for metric in metrics):
        bleu = Bleu(4).compute_score(targets, candidates, verbose=0)
        results |= {f"BLEU-{n}": result for n, result in enumerate(zip(*bleu, strict=True), start=1)}
    if "ROUGE-L" in metrics:
        results["ROUGE-L"] = Rouge().compute_score(targets, candidates)
    if "CIDEr-D" in metrics:
        results["CIDEr-D"] = Cider().compute_score(targets, candidates)
    return results


def _meteor(targets: Texts, candidates: Texts) -> dict[str, Figures]:
    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    command = ("-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm")
    # Both replacements are pycocoevalcap's: our score is equal to its own only with them.
    questions = [
        " ||| ".join(("SCORE", *targets[image_id], caption.replace("|||", "").replace("  ", " ")))
        for image_id, [caption] in candidates.items()
    ]
    with java.start("METEOR", *command, timeout_s=_deadline(len(questions))) as jvm:
        statistics = jvm.ask(questions, len(questions))
        answers = jvm.ask(
            [" ||| ".join(("EVAL", *map(str.strip, statistics)))], len(questions) + 1, last=True
        )
    try:
        *per_image, corpus = map(float, answers)
    except ValueError as error:
        raise UserError(
            f"METEOR: its Java process answered no number ({error}) but a score was due for each image;"
            " install pycocoevalcap again"
        ) from error
    return {"METEOR": (corpus, per_image)}
