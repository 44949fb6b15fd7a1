"""Writes the tree of docs/design.md, a line per file, from the files' first lines: `python docs/tree.py`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
FOLDERS = ("configs", "shards", "launch", "slurm", "benchmarks", "captionscale")
BEGIN, END = "<!-- tree: python docs/tree.py -->\n\n```text\n", "```\n\n<!-- end of tree -->\n"
_WIDTH = 125


def files(folder: Path) -> list[Path]:
    """Return the files of a folder that have something to say."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted((path for path in found if path.stat().st_size), key=_order)


def _order(path: Path) -> list[tuple[bool, str]]:
    """Files come before folders."""
    parts = path.relative_to(ROOT).parts
    return [(place < len(parts) - 1, part) for place, part in enumerate(parts)]


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, or of a file's first comment or title."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    else:
        comments = re.findall(
            r"^(?:# (?!shellcheck)|<!-- |/\* |\{# )(.*?)(?: -->| \*/| #\})?$", text, re.MULTILINE
        )
        found = comments[0] if comments else ""
    return " ".join(found.split())


def lines() -> Iterator[str]:
    """Yield the lines of the tree."""
    last: tuple[str, ...] = ()
    for folder in FOLDERS:
        for path in files(ROOT / folder):
            *parents, name = path.relative_to(ROOT).parts
            for depth, parent in enumerate(parents):
                if tuple(parents[: depth + 1]) != last[: depth + 1]:
                    yield f"{'  ' * depth}{parent}/"
            last = tuple(parents)
            line = f"{'  ' * len(parents)}{name:<22} {summary(path)}".rstrip()
            yield line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3].rpartition(' ')[0]} ..."


def main() -> None:
    """Write the tree into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n".join(lines()) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
