"""Words and their numbers."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from captionscale.errors import UserError

PAD, START, END, UNKNOWN = range(4)
SPECIALS = ("<pad>", "<start>", "<end>", "<unknown>")

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def split_words(caption: str) -> list[str]:
    """Return a caption's words: lower case, without punctuation.

    Examples:
        >>> split_words("A dog's T-shirt, drying!")
        ['a', "dog's", 't-shirt', 'drying']
    """
    return _WORD.findall(caption.lower())


@dataclass(frozen=True)
class Vocabulary:
    """The words that a captioner can read and say; a token is a word's place in it."""

    words: tuple[str, ...]

    @cached_property
    def _tokens(self) -> dict[str, int]:
        return {word: token for token, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    @property
    def sha256(self) -> str:
        """Hash of the words in their order."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, caption: str, max_words: int) -> list[int]:
        """Return start, the tokens of at most `max_words` words, end."""
        words = split_words(caption)[:max_words]
        return [START, *(self._tokens.get(word, UNKNOWN) for word in words), END]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words up to the end token, joined by spaces."""
        words = []
        for token in tokens:
            if token == END:
                break
            if token not in (PAD, START):
                words.append(self.words[token])
        return " ".join(words)

    def save(self, path: Path) -> None:
        """Write the words as JSON."""
        path.write_text(json.dumps({"format": 1, "words": self.words}, ensure_ascii=False), encoding="utf-8")


def build(captions: Iterable[str], min_count: int, max_vocabulary: int | None) -> Vocabulary:
    """Return the words that captions hold at least `min_count` times, most frequent first.

    Args:
        captions: Raw text.
        min_count: Least number of occurrences.
        max_vocabulary: Greatest number of words, the special ones not counted.

    Raises:
        UserError: No word is so frequent.
    """
    counts = Counter(word for caption in captions for word in split_words(caption))
    frequent = [word for word, count in counts.items() if count >= min_count]
    if not frequent:
        raise UserError(
            f"vocabulary: none of {len(counts):,} words of the train captions occurs"
            f" data.min_count = {min_count} times; lower data.min_count"
        )
    frequent.sort(key=lambda word: (-counts[word], word))
    return Vocabulary(SPECIALS + tuple(frequent[:max_vocabulary]))


def load(path: Path) -> Vocabulary:
    """Read what `Vocabulary.save` wrote.

    Raises:
        UserError: Missing, or not a vocabulary.
    """
    try:
        return Vocabulary(tuple(json.loads(path.read_text(encoding="utf-8"))["words"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no vocabulary ({type(error).__name__}); it is written by captionscale train,"
            " take it from the run's checkpoint"
        ) from None
