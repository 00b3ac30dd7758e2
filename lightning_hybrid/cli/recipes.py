"""`recipes ls`, `recipes cp NAME [FOLDER]`, `recipes show NAME`: the configurations that come with the package."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from lightning_hybrid.cli.errors import ArgumentParser, CommandError, UsageError, did_you_mean

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")
"""The folder in a wheel, and the one of a repository from which the package is installed as editable."""
_SUMMARY_LENGTH = 90
"""Characters of a description."""


def run(name: str, args: list[str]) -> None:
    """Runs `recipes ls|cp|show`."""
    parser = ArgumentParser(prog=f"lightning-hybrid {name}", description="Example configurations for `fit --config`.")
    actions = parser.add_subparsers(dest="action", required=True, parser_class=ArgumentParser)
    actions.add_parser("ls", description="Lists the recipes.", help="list the recipes")
    copied = actions.add_parser("cp", description="Copies a recipe.", help="copy a recipe into a folder")
    copied.add_argument("recipe", help="its name, as `recipes ls` shows it")
    copied.add_argument("folder", nargs="?", type=Path, default=Path(), help="the folder; default: the current one")
    shown = actions.add_parser("show", description="Prints a recipe.", help="print a recipe")
    shown.add_argument("recipe", help="its name, as `recipes ls` shows it")
    parsed = parser.parse_args(args)
    if parsed.action == "ls":
        _list()
    elif parsed.action == "show":
        sys.stdout.write(recipe_path(parsed.recipe).read_text())
    else:
        _copy(parsed.recipe, parsed.folder)


def recipes() -> dict[str, Path]:
    """Returns the files of all recipes by name; a recipe in a folder of its own has the folder in its name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise CommandError(f"the recipes are missing: there is no folder {_FOLDERS[0]}. Install the package again.")
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def recipe_path(name: str) -> Path:
    """Returns the file of a recipe.

    Raises:
        UsageError: If there is none of this name.
    """
    known = recipes()
    name = name.removesuffix(".yaml")
    if name not in known:
        raise UsageError(f"unknown recipe `{name}`. {did_you_mean(name, known)} See `lightning-hybrid recipes ls`.")
    return known[name]


def _list() -> None:
    known = recipes()
    width = max(map(len, known)) + 2
    sys.stdout.write("".join(f"{name:{width}}{summary(path)}\n" for name, path in known.items()))


def summary(path: Path) -> str:
    """Returns the first sentence of a recipe's comment, shortened."""
    comment = re.match(r"(?:#.*\n)*", path.read_text())
    lines = [line.removeprefix("#").strip() for line in (comment[0] if comment else "").splitlines()]
    first = " ".join(lines).partition("  ")[0]
    first = f"{first} ".partition(". ")[0].strip().rstrip(":.")
    if len(first) > _SUMMARY_LENGTH:
        first = first[:_SUMMARY_LENGTH].rpartition(" ")[0].rstrip(",") + " ..."
    return first


def _copy(name: str, folder: Path) -> None:
    source = recipe_path(name)
    target = folder / source.name
    if target.exists():
        raise CommandError(f"{target} exists. Remove it, or choose another folder: `recipes cp {name} FOLDER`.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    sys.stdout.write(f"{target}\nRun it with: lightning-hybrid fit --config {target}\n")
