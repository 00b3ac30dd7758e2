"""The support table, feature by layout, made from the tests that ran: `pytest --support-table docs/support.md`.

`@pytest.mark.feature("self.log", ...)` on a test names what it shows, and its parameter `layout` says under which
layout. Where a parameter has the names, `by` is that parameter, with `prefix` before them; `layout` is for a test
without such a parameter, and `refused=True` for one of a documented refusal, as `refused(request)` is within a test.
A test counts if it passes. A feature of several tests is supported where all have passed, and some did run.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

COLUMNS = (
    "dp2",
    "fsdp2",
    "tp2",
    "pp2",
    "dp2-pp2",
    "fsdp2-pp2",
    "tp2-pp2",
    "fsdp2-tp2",
    "dp2-fsdp2",
    "ep2",
    "fsdp2-ep2",
    "ep2-pp2",
)
START, END = "<!-- support table -->", "<!-- end of the support table -->"
REFUSED = pytest.StashKey[bool]()


def refused(request: pytest.FixtureRequest) -> None:
    """Notes that the running test has shown a refusal."""
    request.node.stash[REFUSED] = True


def features_of(item: Any) -> list[str]:
    """What a test shows."""
    found: list[str] = []
    for mark in item.iter_markers("feature"):
        found += mark.args
        if "by" in mark.kwargs:
            found.append(mark.kwargs.get("prefix", "") + str(_parameters(item)[mark.kwargs["by"]]))
    return found


def layout_of(item: Any) -> str | None:
    """Under which layout a test shows it; None if no layout of the table."""
    marked = [m.kwargs["layout"] for m in item.iter_markers("feature") if "layout" in m.kwargs]
    layout = marked[0] if marked else _parameters(item).get("layout")
    return layout if layout in COLUMNS else None


def is_refusal(item: Any) -> bool:
    """Whether a test shows that the feature is refused."""
    return item.stash.get(REFUSED, False) or any(m.kwargs.get("refused") for m in item.iter_markers("feature"))


def _parameters(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


class SupportTable:
    """Collects what the tests of a run have shown."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.features: dict[str, None] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        """Notes the outcome of a test's own phase, and every failure of the others."""
        report = yield
        layout = layout_of(item)
        if layout is not None and not report.skipped and (report.when == "call" or report.failed):
            shown = "refused" if is_refusal(item) else "yes"
            for feature in features_of(item):
                self.features[feature] = None
                self.outcomes[feature, layout].add(shown if report.passed else "failed")
        return report

    def rows(self) -> list[list[str]]:
        """The lines of the table: a feature, and per layout `yes`, `refused`, `failed` or nothing where no test ran."""
        return [[f, *(_cell(self.outcomes.get((f, layout), set())) for layout in COLUMNS)] for f in self.features]


def _cell(outcomes: set[str]) -> str:
    for worst in ("failed", "refused", "yes"):
        if worst in outcomes:
            return worst
    return ""


def markdown(rows: list[list[str]]) -> str:
    """The table as it stands in the documentation."""
    lines = [["feature", *(f"`{layout}`" for layout in COLUMNS)], ["---"] * (len(COLUMNS) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def features_in(text: str) -> list[str]:
    """The features of the table in a documentation file."""
    inside = text[text.index(START) : text.index(END)]
    lines = [line for line in inside.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]


def write(path: Path, rows: list[list[str]]) -> None:
    """Puts the table between its marks in a file.

    Raises:
        ValueError: If the file has no marks.
    """
    text = path.read_text()
    if START not in text or END not in text:
        raise ValueError(f"`--support-table {path}` needs a file with the lines '{START}' and '{END}'.")
    before, after = text[: text.index(START)], text[text.index(END) :]
    path.write_text(f"{before}{START}\n\n{markdown(rows)}\n\n{after}")
