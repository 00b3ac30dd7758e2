"""The public API: `__all__` of the package and its three subpackages; documents and recipes use nothing else."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_hybrid

ROOT = Path(__file__).parents[2]
PUBLIC = ("lightning_hybrid", "lightning_hybrid.callbacks", "lightning_hybrid.data", "lightning_hybrid.models")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.yaml"))]
CODE = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
PATHS = re.compile(r"\blightning_hybrid((?:\.\w+)+)")


def _is_public(path: str) -> bool:
    """Returns True for a public module, or a name in `__all__` of one, or an attribute of such a name."""
    if path in PUBLIC:
        return True
    for module in PUBLIC:
        name = path.removeprefix(f"{module}.").split(".")[0]
        if path.startswith(f"{module}.") and name in importlib.import_module(module).__all__:
            return True
    return False


def _documented(text: str) -> Iterator[str]:
    """Yields what a page imports from the package, and paths that it names."""
    for block in CODE.findall(text):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_hybrid"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
    yield from (f"lightning_hybrid{path}" for path in PATHS.findall(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_documented_is_public(page: Path) -> None:
    programs = {"lightning_hybrid.cli"}  # python -m
    assert [path for path in _documented(page.read_text()) if not _is_public(path) and path not in programs] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_there_and_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for public in module.__all__:
        assert getattr(module, public).__doc__
    assert set(module.__all__) <= set(dir(module))


def test_the_package_has_a_version_and_lazy_names() -> None:
    assert re.match(r"\d+\.\d+\.\d+", lightning_hybrid.__version__)
    assert lightning_hybrid.callbacks.AdaptiveBatchSize
    with pytest.raises(AttributeError, match="module 'lightning_hybrid' has no attribute 'HybridStrateg'"):
        lightning_hybrid.HybridStrateg  # type: ignore[attr-defined]  # noqa: B018
