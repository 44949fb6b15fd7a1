"""`captionscale bench reward`: CIDEr-D of sampled captions, beside the way of dictionaries."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int
from pycocoevalcap.cider.cider_scorer import CiderScorer

from captionscale.data.sources import coco
from captionscale.errors import UserError
from captionscale.score.ciderd import CiderDReward
from captionscale.tools.bench.race import Heat, Way, race
from captionscale.vocab import END, build

_TOLERANCE = 1e-6

# Captions after which memory is looked at, and their words.
_SCORED, _LENGTH = 1_000_000, 12

# A step of self-critical training.
_IMAGES, _SAMPLES = 256, 5

# Of the invented captions: as many as those of COCO's validation images.
_INVENTED, _REFERENCES, _WORDS = 5000, 5, 9000

# Ours in a turn: the clock of processor time ticks every 10 ms.
_TIMES = 100

_ORDERS, _SIGMA = 4, 6.0

Caption = Sequence[int]
Vectors = tuple[list[dict[tuple[int, ...], float]], list[float], int]


def bench(references: Path | None, *, rounds: int, scored: int = _SCORED) -> list[Heat]:
    """Race them.

    Args:
        references: COCO captions; None: invented ones.
        rounds: Of each way.
        scored: Captions after which memory is looked at.

    Raises:
        UserError: No such captions.
    """
    random = np.random.default_rng(0)
    tokens = _invented(random) if references is None else _tokens(references)
    images = np.repeat(random.choice(len(tokens), _IMAGES, replace=len(tokens) < _IMAGES), _SAMPLES)
    words = np.concatenate([caption[:-1] for captions in tokens for caption in captions])
    samples = [_sample(random, tokens[image], words) for image in images]
    reward, published, plain = CiderDReward(tokens), _Published(tokens), _Plain(tokens)
    expected = published(images, samples)
    difference = max(abs(found(images, samples) - expected).max() for found in (reward, plain))

    def often() -> None:
        for _ in range(_TIMES):
            reward(images, samples)

    heat = race(
        f"Reward of {len(images):,} captions, document frequencies of {len(tokens):,} images",
        "captions",
        [
            Way("captionscale", often, _TIMES * len(images)),
            Way("dictionaries, as published", lambda: published(images, samples), len(images)),
            Way("dictionaries, written anew", lambda: plain(images, samples), len(images)),
        ],
        rounds,
        by_cpu=True,
    )
    if difference > _TOLERANCE:
        raise UserError(
            f"bench reward: two scorers differ by {difference:g}, wanted at most {_TOLERANCE:g};"
            " tell us of it"
        )
    before = _resident()
    for _ in range(scored // len(images) + 1):
        reward(images, random.choice(words, (len(images), _LENGTH)).tolist())
    grown = (_resident() - before) / 2**20
    heat.notes += [
        f"On one core. The greatest difference of two scores is {difference:.1e}, of 10.",
        f"The process had {before / 2**20:,.0f} MB; after {scored:,} other captions {grown:+.1f} MB.",
    ]
    return [heat]


def _resident() -> int:
    """Return the bytes of memory that this process has, where the system tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 0


def _tokens(references: Path) -> list[list[list[int]]]:
    captions = [*coco.read_references(references).values()]
    vocabulary = build((caption for each in captions for caption in each), 1, None)
    return [[vocabulary.encode(caption, 50)[1:] for caption in each] for each in captions]


def _invented(random: np.random.Generator) -> list[list[list[int]]]:
    """Return references whose words are as unevenly frequent as in a language, alike for an image."""
    tokens = []
    for _ in range(_INVENTED):
        theme = random.zipf(1.3, 30) % _WORDS + END + 2
        lengths = np.clip(random.normal(10.5, 2.4, _REFERENCES).astype(int), 5, 40)
        tokens.append([[*random.choice(theme, length).tolist(), END] for length in lengths])
    return tokens


def _sample(
    random: np.random.Generator, references: list[list[int]], words: Int[np.ndarray, "word"]
) -> list[int]:
    """Return what a captioner might sample: a reference with some other words, or one that has no end."""
    tokens = np.array(references[random.integers(len(references))])
    changed = np.flatnonzero(random.random(len(tokens) - 1) < 0.3)
    tokens[changed] = random.choice(words, len(changed))
    return [*tokens[: None if random.random() < 0.9 else -1].tolist()]


class _Published:
    """The scorer of self-critical training: pycocoevalcap's, with document frequencies counted beforehand.

    Source:
        ruotianluo/self-critical.pytorch, whose cider/pyciderevalcap/ciderD is that code with this change.
    """

    def __init__(self, references: Sequence[Sequence[Caption]]):
        self.references = [[_text(caption) for caption in captions] for captions in references]
        corpus = CiderScorer()
        for captions in self.references:
            corpus += ("", captions)
        corpus.compute_doc_freq()
        self.frequencies: defaultdict[tuple[str, ...], float] = corpus.document_frequency

    def __call__(
        self, images: Int[np.ndarray, "caption"], captions: Sequence[Caption]
    ) -> Float64[np.ndarray, "caption"]:
        scorer = _WithKnownFrequencies(self.frequencies, len(self.references))
        for image, caption in zip(images, captions, strict=True):
            scorer += (_text(caption), self.references[image])
        return np.array(scorer.compute_cider())


class _WithKnownFrequencies(CiderScorer):  # type: ignore[misc]
    # It would take the number of scored captions for that of images.
    ref_len = property(lambda self: np.log(float(self.images)), lambda *_: None)

    def __init__(self, frequencies: defaultdict[tuple[str, ...], float], images: int):
        super().__init__()
        self.document_frequency, self.images = frequencies, images


def _text(caption: Caption) -> str:
    return " ".join(map(str, caption))


class _Plain:
    """The same way, written anew without what costs time: numpy for single numbers, tokens as text."""

    def __init__(self, references: Sequence[Sequence[Caption]]):
        self.references = references
        self.frequencies: Counter[tuple[int, ...]] = Counter()
        for captions in references:
            self.frequencies.update({n_gram for caption in captions for n_gram in _count(caption)})
        self.images = math.log(len(references))

    def __call__(
        self, images: Int[np.ndarray, "caption"], captions: Sequence[Caption]
    ) -> Float64[np.ndarray, "caption"]:
        return np.array([self._score(*each) for each in zip(images.tolist(), captions, strict=True)])

    def _score(self, image: int, caption: Caption) -> float:
        own = self._vectors(_count(caption))
        references = self.references[image]
        total = sum(self._likeness(own, self._vectors(_count(reference))) for reference in references)
        return 10 * total / _ORDERS / len(references)

    def _vectors(self, counts: Counter[tuple[int, ...]]) -> Vectors:
        weights: list[dict[tuple[int, ...], float]] = [{} for _ in range(_ORDERS)]
        squares = [0.0] * _ORDERS
        pairs = 0
        for n_gram, count in counts.items():
            n = len(n_gram) - 1
            weight = count * (self.images - math.log(max(1, self.frequencies.get(n_gram, 0))))
            weights[n][n_gram] = weight
            squares[n] += weight**2
            pairs += count * (n == 1)
        return weights, [math.sqrt(square) for square in squares], pairs

    def _likeness(self, own: Vectors, other: Vectors) -> float:
        total = 0.0
        for ours, our_norm, theirs, their_norm in zip(*own[:2], *other[:2], strict=True):
            product = 0.0
            for n_gram, weight in ours.items():
                their_weight = theirs.get(n_gram, 0.0)
                product += min(weight, their_weight) * their_weight
            if our_norm and their_norm:
                total += product / (our_norm * their_norm)
        return total * math.exp(-((own[2] - other[2]) ** 2) / (2 * _SIGMA**2))


def _count(caption: Caption) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(caption[start : start + n])
        for n in range(1, _ORDERS + 1)
        for start in range(len(caption) - n + 1)
    )
