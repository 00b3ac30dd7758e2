"""Links and code of the documentation, pre-commit, the mark of a typed package, places of private imports."""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_overview_has_every_page() -> None:
    index, readme = (ROOT / "docs/index.md").read_text(), (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name}" in readme
        assert page.name == "index.md" or f"]({page.name}" in index


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/how-it-works.md"])
def test_the_map_names_files_that_exist(name: str) -> None:
    for path in re.findall(r"`([a-z_]+/(?:[\w/]+\.py)?)`", (ROOT / name).read_text()):
        assert (ROOT / path).exists() or (ROOT / "lightning_hybrid" / path).exists(), path
    folders = {p.name for p in (ROOT / "lightning_hybrid").iterdir() if (p / "__init__.py").exists()}
    assert folders <= set(re.findall(r"`(\w+)/`", (ROOT / name).read_text()))


def test_pre_commit_runs_what_lint_runs() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    linted = [line.strip().removeprefix("$(BIN)/").split() for line in recipe.splitlines()[1:]]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    committed = [hook["entry"].removeprefix(".venv/bin/").split() for hook in hooks]

    def commands(lines: list[list[str]]) -> list[list[str]]:
        return [[word for word in line if not word.startswith("-") and word != "."] for line in lines]

    assert commands(committed) == commands(linted)


def test_the_package_is_typed() -> None:
    assert files("lightning_hybrid").joinpath("py.typed").is_file()


def _private_imports(path: Path) -> list[str]:
    """Returns the private names of torch and of Lightning that a file imports."""
    imported: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
    return [n for n in imported if re.match(r"(torch|torchmetrics|lightning|wandb)\.(.*\.)?_", n)]


def test_private_apis_are_imported_in_two_places() -> None:
    """Ruff (SLF001) sees private attributes, but no private imports."""
    package = ROOT / "lightning_hybrid"
    found = {str(path.relative_to(package)): _private_imports(path) for path in package.rglob("*.py")}
    places = {Path(path).parts[0] for path, names in found.items() if names}
    assert places == {"_torch_private", "_lightning_private"}, {k: v for k, v in found.items() if v}
