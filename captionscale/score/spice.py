"""SPICE: are the objects, attributes and relations of the references in the caption?"""

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from pycocoevalcap.spice import spice

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import sha256_of, temp_folder
from captionscale.score import java
from captionscale.score.optional_metrics import OptionalMetrics
from captionscale.score.tokenizer import tokenize

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
ARCHIVE = "nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
_HINT = "mostly memory is short or --spice holds other jars: give the job 8 GB and look at the jars"
JAVA_VERSIONS = range(8, 15)
"""SPICE writes its results by Java's own JavaScript engine, which came with Java 8 and went with Java 15."""


def measure(
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    folder: Path,
    *,
    memory_gb: float = 8.0,
    timeout_s: float | None = None,
) -> OptionalMetrics:
    """Compute the SPICE of one caption for each image.

    Args:
        captions: The caption of each image.
        references: The human captions of each image.
        folder: Holds the two jars of Stanford CoreNLP 3.6.0, the program and its models.
        memory_gb: That its Java process may use for what it computes with.
        timeout_s: It is stopped after this time; none: ten minutes and half a second for each text.

    Returns:
        SPICE, 0 to 1; its signature names the jars by their SHA-256.

    Raises:
        UserError: A jar is missing or damaged, there is no Java of the right version, or it failed.

    Source:
        Anderson et al. 2016, "SPICE: Semantic Propositional Image Caption Evaluation" (arXiv:1607.08822); its
        program comes with pycocoevalcap.  We leave out its cache, whose library needs a processor of Intel's
        kind; it saves time in a second run and changes no score.  Stanford publishes no checksum of the jars:
        they are read through by the checksums inside them.
    """
    jars, launcher = find_jars(folder), find_java()
    program = Path(spice.__file__).with_name(spice.SPICE_JAR)
    image_ids = sorted(references)
    tokenized = iter(
        tokenize([text for image_id in image_ids for text in (captions[image_id], *references[image_id])])
    )
    # As text: its JSON passes through JavaScript, whose numbers are exact to 2**53 only.
    images = [
        {
            "image_id": str(image_id),
            "test": next(tokenized),
            "refs": [next(tokenized) for _ in references[image_id]],
        }
        for image_id in image_ids
    ]
    texts = len(image_ids) + sum(map(len, references.values()))
    with temp_folder("spice") as place:
        question, answer = place / "captions.json", place / "scores.json"
        question.write_text(json.dumps(images), encoding="utf-8")
        command: list[str | Path] = [
            f"-Xmx{round(memory_gb * 1024)}M",
            # Ours before those that an earlier use of pycocoevalcap's own class may have put beside it.
            *("-cp", os.pathsep.join(map(str, [*jars, program]))),
            *("edu.anu.spice.SpiceScorer", question, "-out", answer, "-subset", "-silent"),
        ]
        deadline = timeout_s or 600 + 0.5 * texts
        with java.start("SPICE", *command, hint=_HINT, java=launcher) as jvm:
            # One line, which says how long it took.
            jvm.query([], 1, timeout_s=deadline, last=True)
        scores = parse(answer.read_text(encoding="utf-8"), image_ids)
    parts = zip(("program", "corenlp", "models"), (program, *jars), strict=True)
    return OptionalMetrics(
        {"SPICE": np.array([scores[image_id] for image_id in image_ids])},
        " ".join(["spice 1.0 corenlp-3.6.0", *(f"{name}={sha256_of(path)}" for name, path in parts)]),
    )


def parse(text: str, image_ids: Sequence[int]) -> dict[int, float]:
    """Read the F-score of each image, by its id, from what SPICE writes.

    Raises:
        UserError: No such JSON, or not one number for each image.
    """
    try:
        found = [(int(line["image_id"]), float(line["scores"]["All"]["f"])) for line in parsing.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise _odd(f"no result ({type(error).__name__}: {error})") from None
    scores = dict(found)
    if len(found) != len(scores) or scores.keys() != set(image_ids):
        raise _odd(f"{len(found):,} results for {len(image_ids):,} images")
    if strange := [image_id for image_id, value in found if not 0 <= value <= 1]:
        raise _odd(f"{scores[strange[0]]} for image {strange[0]}")
    return scores


def find_jars(folder: Path) -> list[Path]:
    """Return the jars of Stanford CoreNLP in a folder, read through.

    Raises:
        UserError: One is missing or damaged.
    """
    return [_checked(folder / name) for name in JARS]


def find_java() -> str:
    """Return the launcher of a Java that runs SPICE: that of JAVA_HOME, or the one on PATH.

    Raises:
        UserError: There is none.
    """
    found = {launcher: _version(launcher) for launcher in _launchers()}
    for launcher, version in found.items():
        if version in JAVA_VERSIONS:
            return launcher
    listed = ", ".join(f"{launcher} ({version or 'does not start'})" for launcher, version in found.items())
    raise UserError(
        f"SPICE: found Java {listed or 'nowhere'}, wanted version {JAVA_VERSIONS[0]} to {JAVA_VERSIONS[-1]}, as later ones"
        " cannot write its results; install or load one, such as openjdk-8, and set JAVA_HOME to its folder"
    )


def _launchers() -> Iterator[str]:
    if home := os.environ.get("JAVA_HOME"):
        yield str(Path(home, "bin", "java"))
    if on_path := shutil.which("java"):
        yield on_path
    try:
        yield java.find_java()
    except UserError:
        return


def _version(launcher: str) -> int | None:
    try:
        said = subprocess.run([launcher, "-version"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    number = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(number[1]) if number else None


def _checked(jar: Path) -> Path:
    cure = f"unzip {ARCHIVE} and give the folder that comes out of it as --spice"
    if not jar.is_file():
        found = "a folder" if jar.is_dir() else "no such file"
        raise UserError(f"{jar}: {found}, wanted a jar of Stanford CoreNLP 3.6.0; {cure}")
    try:
        with zipfile.ZipFile(jar) as file:
            damaged = file.testzip()
    # A damaged stream raises zlib.error, EOFError, NotImplementedError or others, each in its place.
    except Exception as error:
        damaged = str(error)
    if damaged is not None:
        raise UserError(f"{jar}: damaged ({damaged}), wanted a whole jar; fetch it again: {cure}")
    return jar.resolve()


def _odd(found: str) -> UserError:
    return UserError(
        f"SPICE: its Java process wrote {found}, wanted a number from 0 to 1 for each image; give --spice the"
        " jars of Stanford CoreNLP 3.6.0"
    )
