"""Statistics of captions that show when a score was won by other means than good captions."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypedDict

import numpy as np

from captionscale.vocab import split_words

# fmt: off
DANGLING = frozenset((
    "a", "an", "the", "in", "for", "at", "of", "with", "before", "after", "on", "upon", "near", "to", "is",
    "are", "am",
    "and", "by", "from", "or",
))
# fmt: on
"""Words that a complete English caption hardly ever ends with.

Source:
    `bad_endings` of ruotianluo/self-critical.pytorch, eval_utils.py; the last four are ours.
"""
MAX_LENGTH_BIN = 50
_SHARES = {
    "empty": "empty",
    "dangling_endings": "dangling endings",
    "repeated_words": "repeated words",
    "repeated_3_grams": "repeated 3-grams",
    "distinct": "distinct captions",
    "novel": "novel captions",
}


class CaptionStatistics(TypedDict):
    """Statistics of one set of captions; shares are 0 to 1, of all captions."""

    captions: int
    empty: float
    dangling_endings: float
    """Share whose last word is one of `DANGLING`."""
    repeated_words: float
    """Share with a word twice in a row."""
    repeated_3_grams: float
    """Share with the same three words in a row twice."""
    distinct: float
    """Distinct captions / captions."""
    novel: float | None
    """Share that is not a train caption; None if these are not available."""
    vocabulary_size: int
    """Distinct words."""
    vocabulary_coverage: float | None
    """Their share of the model's vocabulary; None if that is not known."""
    length_mean: float
    """In words."""
    length_std: float
    length_histogram: list[int]
    """Captions of 0, 1, 2, ... words; the last bin is `MAX_LENGTH_BIN` or more."""


class Diagnostics(TypedDict):
    """Statistics of captions and of references."""

    captions: CaptionStatistics
    references: CaptionStatistics
    """Of each image's first reference, so that there are as many as captions."""


def diagnose(
    captions: Mapping[int, str] | Mapping[str, str],
    references: Mapping[int, Sequence[str]] | Mapping[str, Sequence[str]],
    *,
    train_captions: Iterable[str] | None = None,
    vocabulary_size: int | None = None,
) -> Diagnostics:
    """Return statistics of captions and references; words are in lower case, without punctuation.

    Args:
        captions: The caption of each image.
        references: One or more for each image.
        train_captions: All captions that the model was trained on.
        vocabulary_size: Words that the model can generate.
    """
    known = None if train_captions is None else {" ".join(split_words(caption)) for caption in train_captions}
    first = [group[0] for group in references.values()]
    return Diagnostics(
        captions=_statistics(list(captions.values()), known, vocabulary_size),
        references=_statistics(first, known, None),
    )


def rows(diagnostics: Diagnostics) -> list[tuple[str, str, str]]:
    """Return rows of a table: a name, the captions' value and the references'."""
    ours, theirs = diagnostics["captions"], diagnostics["references"]
    found = []
    for key, name in _SHARES.items():
        shares = [each[key] for each in (ours, theirs)]  # type: ignore[literal-required]
        if shares != [None, None] and (key != "empty" or any(shares)):
            one, other = ("-" if share is None else f"{share:.1%}" for share in shares)
            found.append((name, one, other))
    found.append(("words in use", f"{ours['vocabulary_size']:,}", f"{theirs['vocabulary_size']:,}"))
    one, other = (f"{each['length_mean']:.1f}±{each['length_std']:.1f}" for each in (ours, theirs))
    return [*found, ("words a caption", one, other)]


def table(diagnostics: Diagnostics) -> list[str]:
    """Return diagnostics as lines of text."""
    return [
        f"{name:18}{ours:>10}{human:>12}"
        for name, ours, human in [("", "captions", "references"), *rows(diagnostics)]
    ]


def _statistics(
    captions: Sequence[str], known: Collection[str] | None, vocabulary_size: int | None
) -> CaptionStatistics:
    words = [split_words(caption) for caption in captions]
    texts = [" ".join(each) for each in words]
    lengths = np.array([len(each) for each in words])
    used = {word for each in words for word in each}

    def share(found: Iterable[bool]) -> float:
        return sum(found) / len(texts)

    return CaptionStatistics(
        captions=len(captions),
        empty=share(not each for each in words),
        dangling_endings=share(bool(each) and each[-1] in DANGLING for each in words),
        repeated_words=share(any(one == other for one, other in pairwise(each)) for each in words),
        repeated_3_grams=share(len(set(grams)) < len(grams) for grams in map(_3_grams, words)),
        distinct=len(set(texts)) / len(texts),
        novel=None if known is None else share(text not in known for text in texts),
        vocabulary_size=len(used),
        vocabulary_coverage=None if vocabulary_size is None else len(used) / vocabulary_size,
        length_mean=float(lengths.mean()),
        length_std=float(lengths.std()),
        length_histogram=np.bincount(np.minimum(lengths, MAX_LENGTH_BIN)).tolist(),
    )


def _3_grams(words: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(words, words[1:], words[2:], strict=False))
