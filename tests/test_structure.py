import ast
import graphlib
import re
import runpy
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
ASSET_FOLDERS = ("configs", "shards", "launch", "slurm")
SCRIPTS = ("shards/pack.py", "launch/launch.py")
MAX_MODULE_LINES = 300


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


def modules() -> Iterator[Path]:
    return PACKAGE.rglob("*.py")


def keys(section: type[config.Section], name: str = "config") -> Iterator[tuple[str, str]]:
    """Yield the name of its section and its own of each key, those of a decoder's own options too."""
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
            yield from keys(field.annotation, key)
        else:
            yield name, key
    for each in section.__subclasses__():
        if each.__module__.startswith("captionscale"):
            yield from keys(each, name)


def unread(section: type[config.Section]) -> list[tuple[str, str]]:
    """Return the keys that no other module reads, from their section, `settings` or `config`."""
    found = set()
    for module in modules():
        if not module.name.startswith("config"):
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    found.add((getattr(node.value, "id", getattr(node.value, "attr", "")), node.attr))
    return [
        (name, key)
        for name, key in keys(section)
        if not {(each, key) for each in (name, "settings", "config")} & found
    ]


def test_imports_point_down() -> None:
    linter = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = run(linter, "--no-logo", "--no-cache", folder=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", assets.names("configs", ".toml"))
def test_every_config_loads(name) -> None:
    toml.load(name)


def test_every_key_of_the_config_is_read() -> None:
    assert unread(config.Config) == []


def test_an_unread_key_is_found_even_if_another_object_has_an_attribute_of_its_name() -> None:
    class Surplus(config.Config):
        suffix: str = ".jpg"

    assert unread(Surplus) == [("config", "suffix")]


def test_asset_folders_hold_no_code_but_two_scripts() -> None:
    scripts = {path for folder in ASSET_FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert {str(path.relative_to(ROOT)) for path in scripts} == set(SCRIPTS)
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 12, path
        code = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, code)], path


def test_only_two_packages_reexport_names() -> None:
    full = {path for path in PACKAGE.rglob("__init__.py") if path.stat().st_size}
    assert full == {PACKAGE / "__init__.py", PACKAGE / "score" / "__init__.py"}
    assert captionscale.__all__ == ["load"]
    assert set(score.__all__) == {"Receipt", "score"}


def test_every_folder_of_modules_is_a_package() -> None:
    assert {module.parent for module in modules()} == {path.parent for path in PACKAGE.rglob("__init__.py")}


def test_no_module_is_too_long() -> None:
    lengths = {str(module.relative_to(ROOT)): len(module.read_text().splitlines()) for module in modules()}
    assert len(lengths) == len(list(modules()))
    assert {module: length for module, length in lengths.items() if length > MAX_MODULE_LINES} == {}


def imports(module: Path, names: dict[str, Path]) -> set[str]:
    """Return the modules that one imports anywhere: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{each.name}" for each in node.names}
            found |= full & names.keys() or {node.module}
    return {name for name in found & names.keys() if names[name] != module}


def test_no_imports_form_a_cycle() -> None:
    names = {}
    for module in modules():
        parts = module.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = module
    graph = {name: imports(module, names) for name, module in names.items()}
    assert "captionscale.train.loop" in graph["captionscale.commands.training"]
    graphlib.TopologicalSorter(graph).prepare()


def test_the_tree_of_the_design_page_has_a_line_for_every_file() -> None:
    """`python docs/tree.py` writes it."""
    tree = runpy.run_path(str(ROOT / "docs" / "tree.py"))
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = page.partition(tree["BEGIN"])[2].partition(tree["END"])[0]
    names = [re.match(r" *\S+", line)[0] for line in block.splitlines()]
    assert names == [re.match(r" *\S+", line)[0] for line in tree["lines"]()]
    assert "    loop.py" in names


def test_no_module_has_a_name_without_meaning() -> None:
    assert {"utils", "util", "common", "helpers", "manager", "core", "misc"}.isdisjoint(
        part for module in modules() for part in module.relative_to(PACKAGE).with_suffix("").parts
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_from_anywhere_with_nothing_installed(script, tmp_path) -> None:
    # -S hides the environment's packages, this one included; -I, PYTHONPATH and the current folder.
    bare = [sys.executable, "-I", "-S"]
    assert "No module named 'captionscale'" in run(*bare, "-c", "import captionscale", folder=tmp_path).stderr
    done = run(*bare, ROOT / script, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: captionscale {Path(script).stem} ")
