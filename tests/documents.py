"""The code and the commands of the documentation, as tests run them.

A block of Python in a page is executed, unless a comment in the line before it says why not:
`<!-- not run: needs a GPU -->`. A block with a title, as in `python title="train.py"`, is a file of that name. Other
blocks may use a few names without an import (`tests/unit/docs/test_blocks.py`); they do not depend on one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCE = re.compile(
    r"""^(?:<!--\ not\ run:\ (?P<reason>[^\n]+)\ -->\n+)?
    ```(?P<kind>\w*)(?:\ title="(?P<title>[\w./]+)")?\n(?P<text>.*?)^```$""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    kind: str
    """`"python"`, `"bash"`, `"yaml"`, ...; `""` without a language."""
    text: str
    line: int
    """Number of its first line in the page."""
    title: str | None = None
    """The file that it is."""
    not_run: str | None = None
    """Why it is not run."""


def blocks(page: Path) -> Iterator[Block]:
    """Yields the fenced blocks of a page."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(kind=found["kind"], text=found["text"], line=line, title=found["title"], not_run=found["reason"])


def write_files(page: Path, folder: Path) -> None:
    """Writes the blocks with titles."""
    for block in blocks(page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)


def commands(page: Path) -> Iterator[str]:
    """Yields the lines of `bash` blocks, without comments."""
    for block in blocks(page):
        if block.kind == "bash" and block.not_run is None:
            lines = (line.split("  #")[0].strip() for line in block.text.replace("\\\n", " ").splitlines())
            yield from (line for line in lines if line and not line.startswith("#"))
