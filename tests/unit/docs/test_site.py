"""The site: every page in the navigation, the API reference complete and without anything else."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
PUBLIC = {
    "lightning_hybrid": "strategy",
    "lightning_hybrid.callbacks": "callbacks",
    "lightning_hybrid.data": "data",
    "lightning_hybrid.models": "models",
}
"""The page of each public module."""


class _Loader(yaml.SafeLoader):
    """Reads `mkdocs.yml`, whose tags name functions of mkdocs."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages(value)


def test_the_navigation_has_every_page_once() -> None:
    shown = list(_pages(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"]))
    written = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(shown) == sorted([*written, "contributing.md", "changelog.md"])


@pytest.mark.parametrize(("module", "page"), PUBLIC.items())
def test_the_reference_has_each_public_name_once_and_no_other(module: str, page: str) -> None:
    entries = re.findall(r"^::: (\S+)$", (ROOT / f"docs/api/{page}.md").read_text(), re.MULTILINE)
    assert sorted(entries) == sorted(f"{module}.{name}" for name in importlib.import_module(module).__all__)


@pytest.mark.parametrize(("module", "page"), PUBLIC.items())
def test_members_of_the_reference_are_there(module: str, page: str) -> None:
    text = (ROOT / f"docs/api/{page}.md").read_text()
    for name, members in re.findall(r"^::: \S+\.(\w+)\n    options:\n      members: \[(.*)\]", text, re.MULTILINE):
        for member in filter(None, members.split(", ")):
            place = getattr(importlib.import_module(module), name)
            assert hasattr(place, member) or f"self.{member}:" in inspect.getsource(place), f"{name}.{member}"


def test_the_reference_has_one_page_for_each_module() -> None:
    assert {path.stem for path in (ROOT / "docs/api").glob("*.md")} == set(PUBLIC.values())
