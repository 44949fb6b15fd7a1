"""Files that few expect, new ones each time: see `fuzz.py`, which runs for longer by hand."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

HERE = Path(__file__).parent


def test_no_command_fails_on_a_mutated_file() -> None:
    # A limit for the test, which includes that of each case.
    command = [sys.executable, HERE / "fuzz.py", "--cases", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1_200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"errors": "captionscale: x: damaged; copy it again\n"}, ""),
        ({"errors": "warning: y\ncaptionscale: x: damaged\n"}, ""),
        ({"errors": "Traceback (most recent call last):\n"}, "traceback"),
        ({"errors": "captionscale: x: damaged\nby y\n"}, "error of several lines"),
        ({"errors": ""}, "no error"),
        ({"errors": "captionscale: x\x1b[2J\n"}, "control characters"),
        ({"code": 0, "output": "a\rb"}, "control characters"),
        ({"code": -9}, "exit code -9"),
        ({"code": 0, "growth_mb": 2_000}, "over 1,500 MB"),
    ],
)
def test_what_a_command_does_is_judged(said, problem, tmp_path, monkeypatch) -> None:
    from fuzz import Case, judge

    monkeypatch.chdir(tmp_path)
    assert judge(Case("manifest", "", "show x", **{"code": 1} | said)) == problem


def test_what_a_command_writes_is_judged(tmp_path, monkeypatch) -> None:
    from fuzz import Case, judge
    from fuzz_mutations import CANARY, MARKUP

    monkeypatch.chdir(tmp_path)
    case = Case("manifest", "", "report x --out out.html")
    assert judge(case) == ""
    assert judge(case, ["shards/manifest.json"]) == "changed shards/manifest.json"
    Path(CANARY).mkdir()
    assert judge(case) == "pickle executed"
    Path("out.html").write_text(f"<p>{MARKUP}</p>")
    assert judge(case) == "markup"


def test_a_mutation_is_a_function_of_its_seed(tmp_path) -> None:
    from fuzz_formats import mutate_file

    found = set()
    for seed in (*range(100), *range(100)):
        path = tmp_path / "x.json"
        path.write_text('{"a": [1, 2.5, "b"], "c": {}}')
        what = mutate_file(Random(seed), path)
        found.add((seed, what, path.read_bytes() if path.is_file() and path.stat().st_size < 10**6 else b""))
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert len(found) == 100
