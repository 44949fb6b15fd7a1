"""METEOR, digit for digit pycocoevalcap's, by several JVMs with a part of its paraphrase table each.

Source:
    Denkowski and Lavie 2014, "Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language", in METEOR 1.5's own jar.  `corpus_score` is its formula for English.
"""

import gzip
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import numpy as np
from jaxtyping import Bool, Float, Float64
from pycocoevalcap.meteor import meteor

from captionscale.errors import UserError
from captionscale.files import temp_folder
from captionscale.score import java, paraphrases
from captionscale.score.java import Jvm

# What pycocoevalcap's single JVM takes, at most.
DEFAULT_GB = 1.3

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase

# Measured: with 80 MB of heap it works without a table, an entry takes 75 bytes, and what is beside the heap,
# 70 MB.  With as much again it does not spend its time on collecting.
_HEAP_MB, _ENTRY_MB, _JVM_MB = 160, 1e-4, 70

# What pycocoevalcap's may take.
_MOST_HEAP_MB = 2048

_HINT = "mostly memory is short: give the job more, or raise meteor_gb"
_CHUNKS, _FIELDS = 20, 23

Statistics = Float64[np.ndarray, "image 23"]


class Meteor:
    """METEOR's JVMs, warm for any captions of the same images."""

    def __init__(self, *, workers: int, gb: float, full: bool = False):
        """Start none yet.

        Args:
            workers: At most so many JVMs.
            gb: Memory of all of them together.
            full: With the whole paraphrase table, in one JVM that also makes the figures of the images, as
                pycocoevalcap does.
        """
        self._workers, self._gb, self._full = workers, gb, full
        self._stack = ExitStack()
        self._jvms: list[Jvm] = []
        self._known: set[str] = set()
        self._closed = False
        # JVMs are started by one thread, and may be ended by another.
        self._lock = Lock()

    def open(self) -> None:
        """Allow measurements, also after a `close`."""
        self._closed = False

    def measure(
        self, candidates: Sequence[str], references: Sequence[Sequence[str]], *, once: bool
    ) -> tuple[float, Float64[np.ndarray, "image"], Statistics]:
        """Score one candidate for each image.

        Args:
            candidates: Tokenized.
            references: Tokenized, of each image one or more.
            once: No others will come: start with what these candidates need, which is less.

        Returns:
            The corpus figure, those of the images, and what `corpus_score` takes the sums of.

        Raises:
            UserError: A JVM died twice, overran its deadline, has too little memory, or was closed.
        """
        # Both replacements are pycocoevalcap's: our score is equal to its own only with them.
        candidates = [candidate.replace("|||", "").replace("  ", " ") for candidate in candidates]
        try:
            return self._ask(candidates, references, once)
        except java.JavaProcessError:
            if self._closed:
                raise
            # Perhaps it was killed since the last time.  A second death is no accident.
            self._end()
            return self._ask(candidates, references, once)

    def close(self) -> None:
        """End the JVMs, at whatever they are, and start no others before the next `open`."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._stack.close()
            self._jvms, self._known = [], set()

    def _ask(
        self, candidates: Sequence[str], references: Sequence[Sequence[str]], once: bool
    ) -> tuple[float, Float64[np.ndarray, "image"], Statistics]:
        texts = {text for group in references for text in group}
        if not self._jvms or not texts <= self._known:
            self._end()
            # A cold JVM takes as long for its first hundreds of images as for a thousand later ones.
            self._start(texts, set(candidates) if once else None, most=1 + len(candidates) // 250)
            # With a table for these candidates alone, nothing is known of others.
            self._known = set() if once else texts
        questions = [
            " ||| ".join(("SCORE", *group, candidate))
            for candidate, group in zip(candidates, references, strict=True)
        ]
        # It took 0.1 ms for a pair of captions, and 11 s for one of 1,000 words each.
        timeout_s = 300 + 0.05 * len(candidates) + 1e-6 * sum(len(question) ** 2 for question in questions)
        count = len(self._jvms)
        per_image = np.empty(len(candidates))
        statistics = np.empty((len(candidates), _FIELDS))
        evaluated: list[float] = []

        def share(number: int) -> None:
            mine = questions[number::count]
            lines = self._jvms[number].query(mine, len(mine), timeout_s=timeout_s)
            statistics[number::count] = [_numbers(line, _FIELDS) for line in lines]
            if self._full:
                # The last answer is of these images together, which are all: there is one JVM.
                evaluation = " ||| ".join(("EVAL", *map(str.strip, lines)))
                *figures, whole = self._jvms[number].query([evaluation], len(mine) + 1, timeout_s=timeout_s)
                per_image[:] = [_number(figure) for figure in figures]
                evaluated.append(_number(whole))

        busy = range(min(count, len(candidates)))
        with ThreadPoolExecutor(len(busy)) as threads:
            futures = [threads.submit(share, number) for number in busy]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                # The other threads wait for their JVMs.
                for jvm in self._jvms:
                    jvm.process.kill()
                raise
        statistics[_is_perfect(statistics), _CHUNKS] = 0
        if self._full:
            return evaluated[0], per_image, statistics
        # All are whole numbers, so that no sum of them is rounded.
        total = " ".join(map(str, statistics.sum(0).tolist()))
        [figure] = self._jvms[0].query([f"SING ||| {total}"], 1, timeout_s=timeout_s)
        return _number(figure), corpus_score(statistics), statistics

    def _start(self, references: set[str], candidates: set[str] | None, *, most: int) -> None:
        entries: list[bytes] | None = None
        if self._full:
            count, heap_mb = 1, _MOST_HEAP_MB
        else:
            self._affordable(0)
            needed = None if candidates is None else paraphrases.PhraseIndex(candidates)
            entries = paraphrases.filter_table(
                paraphrases.PhraseIndex(references), needed, lambda: self._closed
            )
            count = min(most, self._affordable(len(entries)))
            heap_mb = min(int(1000 * self._gb / count) - _JVM_MB, _MOST_HEAP_MB)
        jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
        # Used once, it ends before a better compiler has paid.
        flags = (
            f"-Xmx{heap_mb}m",
            "-XX:+UseSerialGC",
            *["-XX:TieredStopAtLevel=1"] * (candidates is not None),
        )
        command: tuple[str | Path, ...] = (*flags, "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm")
        with self._lock:
            if self._closed:
                raise java.JavaProcessError("METEOR: closed while it started, wanted it open; measure again")
            if entries is not None:
                file = self._stack.enter_context(temp_folder("meteor")) / "paraphrases.gz"
                file.write_bytes(gzip.compress(b"".join(entries), compresslevel=1))
                command = (*command, "-a", file)
            for _ in range(count):
                self._jvms.append(self._stack.enter_context(java.start("METEOR", *command, hint=_HINT)))

    def _affordable(self, entries: int) -> int:
        jvm_mb = _HEAP_MB + _ENTRY_MB * entries + _JVM_MB
        if (count := min(self._workers, int(1000 * self._gb / jvm_mb))) < 1:
            raise UserError(
                f"METEOR: found meteor_gb = {self._gb:g}, wanted {math.ceil(jvm_mb / 10) / 100:g} or more for"
                " these references; raise meteor_gb"
            )
        return count


def corpus_score(sums: Float[np.ndarray, "*any 23"]) -> Float64[np.ndarray, "*any"]:
    """Return METEOR, 0 to 1, of the sums of what `Meteor.measure` returns, for any images."""
    lengths, function_words = sums[..., 0:2], sums[..., 2:4]
    stages = sums[..., 4:_CHUNKS].reshape(*sums.shape[:-1], 4, 2, 2)  # stage, content or function, side
    chunks, words = sums[..., _CHUNKS], sums[..., _CHUNKS + 1 :]
    of_content, of_function = DELTA, 1 - DELTA
    matches = (stages * WEIGHTS[:, None, None]).sum(-3)
    weighted = of_content * matches[..., 0, :] + of_function * matches[..., 1, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(
            weighted / (of_content * (lengths - function_words) + of_function * function_words), -1, 0
        )
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        penalty = GAMMA * (chunks / (words.sum(-1) / 2)) ** BETA
    # Without a word or a match there is nothing to divide by: 0, as in the jar.
    figures: Float64[np.ndarray, "*any"] = np.asarray(np.nan_to_num(np.maximum(mean * (1 - penalty), 0)))
    return figures


def _is_perfect(statistics: Statistics) -> Bool[np.ndarray, "image"]:
    """Return which images repeat a reference: their one chunk is no fragment, and does not count."""
    matched = statistics[:, 4:_CHUNKS].reshape(-1, 8, 2).sum(1)
    perfect: Bool[np.ndarray, "image"] = (matched == statistics[:, :2]).all(1) & (statistics[:, _CHUNKS] == 1)
    return perfect


def _numbers(line: str, count: int) -> list[float]:
    numbers = [_number(word) for word in line.split()]
    if len(numbers) != count:
        raise _no_number(line)
    return numbers


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise _no_number(word) from None


def _no_number(said: str) -> UserError:
    return UserError(
        f"METEOR: its Java process answered {said!r:.60} but numbers were due for each image; install"
        " pycocoevalcap again"
    )
