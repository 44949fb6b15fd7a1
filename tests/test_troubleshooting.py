"""The page of errors quotes what the code really says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
DIFFERS = "…"
"""What the page writes for what is put into a message when it is said."""


def quoted() -> list[str]:
    """Return the messages that the page explains: the first cells of its tables."""
    return re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def texts() -> Iterator[str]:
    """Yield each text in the code but docstrings, with the page's sign for what is put into it."""
    for module in (ROOT / "captionscale").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else DIFFERS for part in node.values)
                yield re.sub(f"{DIFFERS}+", DIFFERS, "".join(map(str, parts)))
            elif (
                isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
            ):
                # What `str.format` fills in.
                yield re.sub("{.*?}", DIFFERS, node.value)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return list(texts())


@pytest.mark.parametrize("message", quoted())
def test_the_code_says_what_the_page_explains(message: str, said: list[str]) -> None:
    assert max(map(len, message.split(DIFFERS))) >= len(": no '='")
    assert any(message in text for text in said)


def test_the_page_explains_no_message_twice() -> None:
    assert len(quoted()) == len(set(quoted())) > 50
