"""METEOR, equal to pycocoevalcap's, by several JVMs that each load a part of its paraphrase table.

Source:
    Denkowski and Lavie 2014, "Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language", in METEOR 1.5's own jar; `corpus_score` is its formula for English.
"""

import gzip
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import numpy as np
from jaxtyping import Float, Float64
from pycocoevalcap.meteor import meteor

from captionscale.errors import UserError
from captionscale.files import sha256_of, temp_folder
from captionscale.score import java, paraphrases
from captionscale.score.metric import Metric

DEFAULT_GB = 1.3
"""Memory of pycocoevalcap's single JVM."""

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase

# Measured: 80 MB of heap suffice without a table, an entry takes 75 bytes, and a JVM 70 MB besides its heap.
# Twice the heap keeps the time of garbage collection short.
_HEAP_MB, _ENTRY_MB, _JVM_MB = 160, 1e-4, 70
# pycocoevalcap's limit.
_MAX_HEAP_MB = 2048

_HINT = "mostly memory is short: give the job more, or raise meteor_gb"
_CHUNKS, _FIELDS = 20, 23
_JAR = Path(meteor.__file__).with_name(meteor.METEOR_JAR)

Statistics = Float64[np.ndarray, "image 23"]


class Meteor(Metric):
    """METEOR; its JVMs stay warm for other captions of the same images."""

    name = "METEOR"
    width = _FIELDS
    external = True

    def __init__(self, *, workers: int = 1, gb: float = DEFAULT_GB, full: bool = False, once: bool = False):
        """Start no JVM yet.

        Args:
            workers: Maximum number of JVMs.
            gb: Memory of all of them together.
            full: As pycocoevalcap: one JVM with the whole paraphrase table.
            once: Load only the part of the table that the first captions need.
        """
        self._workers, self._gb, self._full, self._once = workers, gb, full, once
        self._stack = ExitStack()
        self._jvms: list[java.Jvm] = []
        self._known: set[str] = set()
        self._closed = False
        # One thread starts JVMs, another may end them.
        self._lock = Lock()

    @property
    def signature(self) -> str:
        """The Java program, and the table of paraphrases that it loads."""
        table = sha256_of(_JAR.with_name("data") / "paraphrase-en.gz")
        return f"meteor {_JAR.stem} {sha256_of(_JAR)[:8]} table {table[:8]}"

    def open(self) -> None:
        """Allow new JVMs after a `close`."""
        self._closed = False

    def close(self) -> None:
        """End the JVMs, even at work, and start no others before the next `open`."""
        self._closed = True
        self._end()

    def statistics(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        """Return METEOR's counts for each image: words, matches by stage, chunks.

        Raises:
            UserError: A JVM died twice, overran its deadline, has too little memory, or was closed.
        """
        # Both replacements are pycocoevalcap's, and change scores.
        candidates = [candidate.replace("|||", "").replace("  ", " ") for candidate in candidates]
        try:
            return self._query(candidates, references)
        except java.JavaProcessError:
            if self._closed:
                raise
            # It may have been killed since the last call. A second death is no accident.
            self._end()
            return self._query(candidates, references)

    def corpus_score(self, sums: Float[np.ndarray, "*sets 23"]) -> Float64[np.ndarray, "*sets"]:
        """Return METEOR, 0 to 1, of summed statistics."""
        lengths, function_words = sums[..., 0:2], sums[..., 2:4]
        stages = sums[..., 4:_CHUNKS].reshape(*sums.shape[:-1], 4, 2, 2)  # stage, content or function, side
        chunks, words = sums[..., _CHUNKS], sums[..., _CHUNKS + 1 :]
        matches = (stages * _WEIGHTS[:, None, None]).sum(-3)
        weighted = _DELTA * matches[..., 0, :] + (1 - _DELTA) * matches[..., 1, :]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = weighted / (_DELTA * (lengths - function_words) + (1 - _DELTA) * function_words)
            precision, recall = ratios[..., 0], ratios[..., 1]
            mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
            penalty = _GAMMA * (chunks / (words.sum(-1) / 2)) ** _BETA
        # Without a word or a match the divisor is 0, and the score 0, as in the jar.
        return np.asarray(np.nan_to_num(np.maximum(mean * (1 - penalty), 0)))

    def corpus_value(self, statistics: Statistics) -> float:
        """Return METEOR of all images, by the jar itself: its power function differs in the last digit."""
        if not self._jvms:
            return super().corpus_value(statistics)
        # Sums of integers are exact.
        total = " ".join(map(str, statistics.sum(0).tolist()))
        [value] = self._jvms[0].query([f"SING ||| {total}"], 1, timeout_s=300.0)
        return _numbers(value, 1)[0]

    def reference(self, statistics: Statistics) -> tuple[float, list[float]]:
        """Return the corpus value and that of each image, all by the jar itself."""
        rows = [" ".join(map(str, row)) for row in statistics.tolist()]
        evaluation = " ||| ".join(("EVAL", *rows))
        answers = self._jvms[0].query([evaluation], len(rows) + 1, timeout_s=300 + 0.05 * len(rows))
        *values, whole = [_numbers(answer, 1)[0] for answer in answers]
        return whole, values

    def _end(self) -> None:
        with self._lock:
            self._stack.close()
            self._jvms, self._known = [], set()

    def _query(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
        texts = {text for group in references for text in group}
        if not self._jvms or not texts <= self._known:
            self._end()
            # The first hundreds of images take a cold JVM as long as a thousand later ones.
            self._start(texts, set(candidates) if self._once else None, most=1 + len(candidates) // 250)
            # A table for these candidates alone serves no others.
            self._known = set() if self._once else texts
        questions = [
            " ||| ".join(("SCORE", *group, candidate))
            for candidate, group in zip(candidates, references, strict=True)
        ]
        # Measured: 0.1 ms for a pair of captions, 11 s for one of 1,000 words each.
        timeout_s = 300 + 0.05 * len(candidates) + 1e-6 * sum(len(question) ** 2 for question in questions)
        count = len(self._jvms)
        statistics = np.empty((len(candidates), _FIELDS))

        def query_one(number: int) -> None:
            mine = questions[number::count]
            answers = self._jvms[number].query(mine, len(mine), timeout_s=timeout_s)
            statistics[number::count] = [_numbers(answer, _FIELDS) for answer in answers]

        with ThreadPoolExecutor(count) as threads:
            try:
                list(threads.map(query_one, range(min(count, len(candidates)))))
            except BaseException:
                # The other threads wait for their JVMs.
                for jvm in self._jvms:
                    jvm.process.kill()
                raise
        # A candidate equal to a reference is one chunk, which the jar does not count as a fragment.
        matched = statistics[:, 4:_CHUNKS].reshape(-1, 8, 2).sum(1)
        perfect = (matched == statistics[:, :2]).all(1) & (statistics[:, _CHUNKS] == 1)
        statistics[perfect, _CHUNKS] = 0
        return statistics

    def _start(self, references: set[str], candidates: set[str] | None, *, most: int) -> None:
        """Start up to `most` JVMs; None: any candidates may follow."""
        entries: list[bytes] | None = None
        count, heap_mb = 1, _MAX_HEAP_MB
        if not self._full:
            self._affordable(0)
            entries = paraphrases.filter_table(references, candidates, lambda: self._closed)
            count = min(most, self._affordable(len(entries)))
            heap_mb = min(int(1000 * self._gb / count) - _JVM_MB, _MAX_HEAP_MB)
        # Used once, it ends before the better compiler pays.
        compiler = [] if candidates is None else ["-XX:TieredStopAtLevel=1"]
        command: list[str | Path] = [f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", *compiler]
        command += ["-jar", _JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        with self._lock:
            if self._closed:
                raise java.JavaProcessError(
                    "METEOR: closed while it started, expected it open; measure again"
                )
            if entries is not None:
                file = self._stack.enter_context(temp_folder("meteor")) / "paraphrases.gz"
                file.write_bytes(gzip.compress(b"".join(entries), compresslevel=1))
                command += ["-a", file]
            for _ in range(count):
                self._jvms.append(self._stack.enter_context(java.start("METEOR", *command, hint=_HINT)))

    def _affordable(self, entries: int) -> int:
        """Return how many JVMs with so many entries the memory holds."""
        jvm_mb = _HEAP_MB + _ENTRY_MB * entries + _JVM_MB
        if (count := min(self._workers, int(1000 * self._gb / jvm_mb))) < 1:
            raise UserError(
                f"METEOR: found meteor_gb = {self._gb:g}, expected {math.ceil(jvm_mb / 10) / 100:g} or more"
                " for these references; raise meteor_gb"
            )
        return count


def _numbers(answer: str, count: int) -> list[float]:
    try:
        numbers = [float(word) for word in answer.split()]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise UserError(
            f"METEOR: found the answer {answer!r:.60} of its Java process, expected {count} numbers; install"
            " pycocoevalcap again"
        )
    return numbers
