import json
import sys
import zipfile
from pathlib import Path

import pytest

from captionscale.errors import UserError
from captionscale.score import spice

CANDIDATES = ["", "two cats", "a crêpe"]
REFERENCES = [["a"], ["two kittens"], ["a crêpe", "pan cake"]]
SCORES = {"0": 0, "1": 0.25, "2": 1}

# Answers as SPICE does, in an order of its own, but with the scores of a table.
PROGRAM = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
if arguments == ["-version"]:
    sys.exit('openjdk version "{version}" 2014-03-18')
assert "JAVA_TOOL_OPTIONS" not in os.environ and "-Xmx8192M" in arguments
first, second, third = arguments[arguments.index("-cp") + 1].split(os.pathsep)
assert [os.path.basename(path) for path in (first, second, third)] == [*{jars}, "spice-1.0.jar"]
question, out, answer = arguments[arguments.index("edu.anu.spice.SpiceScorer") + 1 :][:3]
scores = {scores}
images = json.load(open(question, encoding="utf-8"))
assert {{image["image_id"]: [image["test"], *image["refs"]] for image in images}} == {texts}, images
lines = [
    {{"image_id": key, "scores": {{"All": {{"f": scores[key], "pr": 1}}, "Color": {{"f": None}}}}}}
    for key in sorted(scores, reverse=True)
]
json.dump(lines, open(answer, "w"), indent=2)
print("SPICE evaluation took: 1.000 min")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with jars of the right names."""
    for name in spice.JARS:
        with zipfile.ZipFile(tmp_path / name, "w") as jar:
            jar.writestr("models.txt", "nothing" * 1000)
    return tmp_path


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str = PROGRAM, **facts: object) -> None:
    """Let a program be the Java of JAVA_HOME, an old one."""
    texts = {str(key): [CANDIDATES[key], *REFERENCES[key]] for key in range(3)}
    defaults = {"version": "1.8.0_452", "scores": SCORES, "jars": list(spice.JARS), "texts": texts}
    launcher = folder / "old" / "bin" / "java"
    launcher.parent.mkdir(parents=True, exist_ok=True)
    launcher.write_text(program.format(python=sys.executable, **defaults | facts), encoding="utf-8")
    launcher.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(folder / "old"))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr")


def test_scores_do_not_depend_on_the_order_of_the_results(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    install(folder, monkeypatch)
    metric = spice.Spice(folder)
    rows = metric.statistics(CANDIDATES, REFERENCES)
    assert rows.tolist() == [[0, 1], [0.25, 1], [1, 1]]
    assert metric.corpus_value(rows) == pytest.approx(1.25 / 3)
    assert [part.partition("=")[0] for part in metric.signature.split()] == [
        *("spice", "1.0", "corenlp-3.6.0", "program", "corenlp", "models")
    ]
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", r"no result \(JSONDecodeError"),
        ("{}", "0 results for 2 images"),
        ("[1]", r"no result \(TypeError"),
        (json.dumps([{"image_id": 1, "scores": {}}]), r"no result \(KeyError: 'All'"),
        (json.dumps([{"image_id": 1, "scores": {"All": {"f": None}}}]), r"no result \(TypeError"),
        (json.dumps([{"image_id": 1, "scores": {"All": {"f": 0.5}}}]), "1 results for 2 images"),
        (json.dumps([{"image_id": 1, "scores": {"All": {"f": 0.5}}}] * 2), "2 results for 2 images"),
        (json.dumps([{"image_id": i, "scores": {"All": {"f": 0.5}}} for i in (0, 2)]), "2 results for 2"),
        (json.dumps([{"image_id": i, "scores": {"All": {"f": 2 * i}}} for i in (0, 1)]), "2.0 for image 1"),
        (
            '[{"image_id": 1, "scores": {"All": {"f": NaN}}}, {"image_id": 0, "scores": {"All": {"f": 0}}}]',
            "nan",
        ),
    ],
)
def test_results_without_one_number_for_each_image_are_refused(text: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        spice.parse(text, 2)


def test_a_missing_or_damaged_jar_is_refused_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice, "find_java", lambda: pytest.fail("looked for Java"))
    models = folder / spice.JARS[1]
    whole = models.read_bytes()
    for damaged in (b"", b"<html>404</html>", whole[:-200], whole.replace(b"nothing", b"nothinG", 1)):
        models.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"models\.jar: damaged .*; download it again: unzip nlp\.stanford"
        ):
            spice.Spice(folder)
    models.unlink()
    with pytest.raises(UserError, match=r"models\.jar: no such file, expected a jar of Stanford"):
        spice.Spice(folder)


def test_an_unfit_java_is_refused_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder, monkeypatch, version="15.0.1")
    monkeypatch.setattr(spice.java, "find_java", lambda: str(folder / "none" / "java"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"java \(15\), .*none/java \(does not start\), expected .* 8 to 14"):
        spice.Spice(folder)
    install(folder, monkeypatch, version="14.0.2")
    assert spice.find_java() == str(folder / "old" / "bin" / "java")


def test_a_failing_program_is_an_error_with_its_last_output(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = PROGRAM.replace("assert ", "sys.exit('java.lang.OutOfMemoryError') # ", 1)
    install(folder, monkeypatch, program)
    with pytest.raises(UserError, match=r"SPICE: its Java process .* output: java\.lang\.OutOfMemoryError\)"):
        spice.Spice(folder).statistics(CANDIDATES, REFERENCES)
    install(folder, monkeypatch, PROGRAM.replace("assert ", "import time; time.sleep(60) # ", 1))
    monkeypatch.setattr(spice, "_TIMEOUT_S", 0.0)
    with pytest.raises(UserError, match=r"stopped at its deadline of 3\.5 s"):
        spice.Spice(folder).statistics(CANDIDATES, REFERENCES)
