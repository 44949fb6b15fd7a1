"""Every command that writes says in one line that the disk is full, and leaves no half file."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import pytest
from experiment import peaked_run

from captionscale.cli import main

FREE_BYTES = 100


@pytest.fixture(scope="module")
def run(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaked_run(tmp_path_factory.mktemp("full"), packed)


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond a few bytes: what the first write fits into, and the next one not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FREE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


COMMANDS = {
    "show": "show SHARDS 1 --out OUT/a.jpg",
    "stats": "stats SHARDS --out OUT/a.png",
    "report": "report RUN --out OUT/a.html",
    "attend": "attend RUN --split val --limit 1 --out OUT",
    "caption": "caption RUN --split val --beam 1 --out OUT/a.json",
    "hub": "export RUN --format hub --out OUT/a",
    "onnx": "export RUN --format onnx --out OUT/a",
    "torch": "export RUN --format torch --out OUT/a",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(name, run, packed, tmp_path, capsys, monkeypatch) -> None:
    if name == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    # While a program is traced its sizes are symbols, which are no `int` to beartype.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    before = sorted(run.rglob("*"))
    words = COMMANDS[name].replace("SHARDS", str(packed)).replace("RUN", str(run))
    with full_disk(), pytest.raises(SystemExit, match="1"):
        main(words.replace("OUT", str(tmp_path)).split())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("captionscale: ")]
    assert len(lines) == 1
    assert f"captionscale: {tmp_path}" in lines[0]
    assert "cannot be written (File too large), expected a writable folder with free space" in lines[0]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert sorted(run.rglob("*")) == before


def test_a_file_that_was_there_stays(packed: Path, tmp_path: Path) -> None:
    saved = tmp_path / "a.jpg"
    saved.write_bytes(b"mine")
    with full_disk(), pytest.raises(SystemExit, match="1"):
        main(["show", str(packed), "1", "--out", str(saved)])
    assert saved.read_bytes() == b"mine"


def test_show_saves_nothing_of_an_image_that_is_not_there(packed: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["show", str(packed), "99999", "--out", str(tmp_path / "a.jpg")])
    assert "99999" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
