"""A table as text."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_WIDTH = 110
"""Characters per line, for log files; the variable COLUMNS has precedence."""


def table_text(title: str, headings: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """Returns the table as lines of text.

    Args:
        title: Title above the table.
        headings: Heading of each column, and whether its cells are aligned to the right.
        rows: The cells.
    """
    table = Table(title=title, title_justify="left")
    for heading, right in headings:
        table.add_column(heading, justify="right" if right else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=None if "COLUMNS" in os.environ else _WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
