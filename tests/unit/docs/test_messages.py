"""Messages of docs/troubleshooting.md are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEADINGS = re.findall(r"^### (.*`)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


def _texts(node: ast.AST) -> Iterator[str]:
    """Yields strings with `{}` for what is filled in; those inside of others, too."""
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in child.values)  # type: ignore[misc] -- strings
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


@cache
def _messages() -> list[str]:
    files = sorted((ROOT / "lightning_hybrid").rglob("*.py"))
    return [text for file in files for text in _texts(ast.parse(file.read_text()))]


def _fragments(heading: str) -> list[str]:
    """Returns the parts of a message between its ellipses."""
    text = re.sub(r"^`` ?| ?``$", "", heading) if heading.startswith("``") else heading.replace("`", "")
    return [part.strip() for part in text.split("…") if part.strip()]


def _contains(message: str, fragments: list[str]) -> bool:
    place = 0
    for fragment in fragments:
        place = message.find(fragment, place)
        if place < 0:
            return False
    return True


def test_there_are_headings() -> None:
    assert len(HEADINGS) > 25


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_message_is_one_of_the_code(heading: str) -> None:
    fragments = _fragments(heading)
    assert any(_contains(message, fragments) for message in _messages()), fragments
