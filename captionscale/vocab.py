"""The vocabulary: words and their tokens."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import MB, read_file

PAD, START, END, UNK = range(4)
SPECIAL_TOKENS = ("<pad>", "<start>", "<end>", "<unknown>")

# split_words never returns these; they would move a terminal's cursor or split a word.
_UNSAFE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")
_MAX_BYTES = 256 * MB
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


class _Document(msgspec.Struct):
    words: tuple[str, ...]


_DOCUMENT = msgspec.json.Decoder(_Document)


def split_words(caption: str) -> list[str]:
    """Return a caption's words: lower case, without punctuation.

    Examples:
        >>> split_words("A dog's T-shirt, drying!")
        ['a', "dog's", 't-shirt', 'drying']
    """
    return _WORD.findall(caption.lower())


@dataclass(frozen=True)
class Vocabulary:
    """The words of a captioner; a token is a word's index."""

    words: tuple[str, ...]

    @cached_property
    def _tokens(self) -> dict[str, int]:
        return {word: token for token, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    @property
    def sha256(self) -> str:
        """Hash of the words in order."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, caption: str, max_words: int) -> list[int]:
        """Return START, the tokens of at most `max_words` words, END."""
        words = split_words(caption)[:max_words]
        return [START, *(self._tokens.get(word, UNK) for word in words), END]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words before END, joined by spaces."""
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


def build(captions: Iterable[str], min_count: int, max_vocab_size: int | None) -> Vocabulary:
    """Return the words that occur at least `min_count` times, most frequent first.

    `max_vocab_size` does not count the special tokens.

    Raises:
        UserError: No word is frequent enough.
    """
    counts = Counter(word for caption in captions for word in split_words(caption))
    frequent = [word for word, count in counts.items() if count >= min_count]
    if not frequent:
        raise UserError(
            f"vocabulary: none of {len(counts):,} words of the train captions occurs"
            f" data.min_count = {min_count} times; lower data.min_count"
        )
    frequent.sort(key=lambda word: (-counts[word], word))
    return Vocabulary(SPECIAL_TOKENS + tuple(frequent[:max_vocab_size]))


def load(path: Path) -> Vocabulary:
    """Read what `Vocabulary.save` wrote.

    Raises:
        UserError: Missing, or not a vocabulary.
    """
    try:
        words = parsing.decode(read_file(path, _MAX_BYTES), _DOCUMENT).words
        if words[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
            raise ValueError(f"the first words are not {', '.join(SPECIAL_TOKENS)}")
        if len(set(words)) != len(words):
            raise ValueError("a word occurs twice")
        if odd := [word for word in words if not word or _UNSAFE.search(word)]:
            raise ValueError(f"{odd[0]!r:.80} is not a word")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: no vocabulary ({reason}), expected the words of a run; it is written by captionscale"
            " train, take it from the run's checkpoint"
        ) from None
    return Vocabulary(words)
