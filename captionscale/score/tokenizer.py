"""Split captions into words as the Penn Treebank does: the text that all metrics read.

Source:
    Stanford CoreNLP 3.4.1 with the flags and the punctuation list of pycocoevalcap.  All separators and
    control characters become a space first, so that each caption is one line and stays at its image.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from captionscale.score import java

# What the tokenizer takes for a line end or for nothing at all, and halves of emoji, which no file can hold.
_BREAKS = r"\s\x00-\x1f\x7f\ud800-\udfff"
LINE_BREAKS = re.compile(f"[{_BREAKS}]+")
# What a reader cannot see either, though the tokenizer takes some of it for signs of old code pages.
INVISIBLE = re.compile(rf"[{_BREAKS}\x80-\x9f]+")


def tokenize(texts: Sequence[str]) -> list[str]:
    """Return texts in lower case and without punctuation, their words parted by one space.

    What a text becomes does not depend on the others.  An empty text stays an empty one.

    Raises:
        UserError: The tokenizer failed, or there is no Java.
    """
    lines = [LINE_BREAKS.sub(" ", text).strip() for text in texts]
    if not any(lines):
        return lines
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    # Its answers come when its input ends, so that it cannot be kept warm; its first compiler is enough then.
    flags = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
    command = (*flags, "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    with java.start("PTB tokenizer", *command) as jvm:
        # It took 1.5 s for 30,000 lines on two cores; a busy node may be far slower.
        tokenized = jvm.query(lines, len(lines), timeout_s=300 + 0.05 * len(lines), last=True)
    return [_without_punctuation(line) for line in tokenized]


def _without_punctuation(line: str) -> str:
    return " ".join(word for word in line.rstrip().split(" ") if word not in ptbtokenizer.PUNCTUATIONS)
