"""The Penn Treebank tokenizer, whose words all metrics read.

Source:
    Stanford CoreNLP 3.4.1 with the flags and the punctuation list of pycocoevalcap. Separators and control
    characters are replaced by a space first, so each caption is one line and stays at its image.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from captionscale.score import java

# What the tokenizer reads as a line end or drops, and halves of emoji, which no file can hold.
_BREAKS = r"\s\x00-\x1f\x7f\ud800-\udfff"
LINE_BREAKS = re.compile(f"[{_BREAKS}]+")
# C1 controls are invisible too, but the tokenizer reads some of them as signs of old code pages.
INVISIBLE = re.compile(rf"[{_BREAKS}\x80-\x9f]+")
JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)


def tokenize(texts: Sequence[str]) -> list[str]:
    """Return texts in lower case without punctuation, their words joined by one space.

    Raises:
        UserError: The tokenizer failed, or there is no Java.
    """
    lines = [LINE_BREAKS.sub(" ", text).strip() for text in texts]
    if not any(lines):
        return lines
    # It answers when its input ends, so it cannot be kept warm; its first compiler is enough then.
    flags = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
    command = (*flags, "-cp", JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    with java.start("PTB tokenizer", *command) as jvm:
        # 30,000 lines took 1.5 s on two cores; a busy node may be far slower.
        tokenized = jvm.query(lines, len(lines), timeout_s=300 + 0.05 * len(lines), last=True)
    return [_without_punctuation(line) for line in tokenized]


def _without_punctuation(line: str) -> str:
    return " ".join(word for word in line.rstrip().split(" ") if word not in ptbtokenizer.PUNCTUATIONS)
