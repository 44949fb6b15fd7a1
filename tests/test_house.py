import ast
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import captionscale
from captionscale import assets, config, score, toml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "captionscale"
HANDLES = ("configs", "shards", "launch", "slurm")
DOORS = ("shards/pack.py", "launch/launch.py")
LONGEST_ROOM = 330


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


def rooms() -> Iterator[Path]:
    return PACKAGE.rglob("*.py")


def keys(section: type[config.Section], name: str = "config") -> Iterator[tuple[str, str]]:
    """Yield the name of its section and its own of each key."""
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
            yield from keys(field.annotation, key)
        else:
            yield name, key


def unread(section: type[config.Section]) -> list[tuple[str, str]]:
    """Return the keys that no room but the config's reads, from their section or from `settings`."""
    found = set()
    for room in rooms():
        if room.name != "config.py":
            for node in ast.walk(ast.parse(room.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    found.add((getattr(node.value, "id", getattr(node.value, "attr", "")), node.attr))
    return [(name, key) for name, key in keys(section) if not {(name, key), ("settings", key)} & found]


def test_imports_go_down_the_floors() -> None:
    linter = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = run(linter, "--no-logo", "--no-cache", folder=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", assets.names("configs", ".toml"))
def test_every_config_loads(name) -> None:
    toml.load(name)


def test_every_key_of_the_config_is_read() -> None:
    assert unread(config.Config) == []


def test_a_key_that_is_not_read_is_noticed_even_if_other_things_have_an_attribute_of_its_name() -> None:
    class Surplus(config.Config):
        suffix: str = ".jpg"

    assert unread(Surplus) == [("config", "suffix")]


def test_the_handles_hold_no_code_but_two_doors() -> None:
    scripts = {path for handle in HANDLES for path in (ROOT / handle).rglob("*.py")}
    assert {str(path.relative_to(ROOT)) for path in scripts} == set(DOORS)
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 12, path
        code = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, code)], path


def test_every_name_has_one_address_but_for_the_three_that_python_programs_import() -> None:
    full = {path for path in PACKAGE.rglob("__init__.py") if path.stat().st_size}
    assert full == {PACKAGE / "__init__.py", PACKAGE / "score" / "__init__.py"}
    assert captionscale.__all__ == ["load"]
    assert set(score.__all__) == {"Receipt", "score"}


def test_every_folder_of_rooms_is_a_floor() -> None:
    assert {room.parent for room in rooms()} == {path.parent for path in PACKAGE.rglob("__init__.py")}


def test_no_room_is_too_long() -> None:
    lengths = {room.name: len(room.read_text(encoding="utf-8").splitlines()) for room in rooms()}
    assert {room: length for room, length in lengths.items() if length > LONGEST_ROOM} == {}


def test_no_room_is_named_after_nothing() -> None:
    assert {"utils", "util", "common", "helpers", "manager", "core", "misc"}.isdisjoint(
        part for room in rooms() for part in room.relative_to(PACKAGE).with_suffix("").parts
    )


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["score", "--help"], ["config"], ["config", "quickstart"]],
    ids=" ".join,
)
def test_help_and_settings_are_shown_without_torch(arguments, tmp_path) -> None:
    done = run(sys.executable, "-X", "importtime", "-m", "captionscale", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "captionscale" in imported
    assert imported.isdisjoint({"torch", "torchvision", "accelerate", "webdataset", "pycocoevalcap"})


@pytest.mark.parametrize("door", DOORS)
def test_a_door_opens_from_anywhere_with_nothing_installed(door, tmp_path) -> None:
    # -S leaves the environment's packages out, this one included; -I, PYTHONPATH and the folder one is in.
    bare = [sys.executable, "-I", "-S"]
    assert "No module named 'captionscale'" in run(*bare, "-c", "import captionscale", folder=tmp_path).stderr
    done = run(*bare, ROOT / door, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: captionscale {Path(door).stem} ")
