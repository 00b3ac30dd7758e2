"""The files of the recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

from lightning_hybrid.cli.errors import CommandError, UsageError, did_you_mean

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")
"""The folder in a wheel, and the one of a repository from which the package is installed as editable."""


def recipes() -> dict[str, Path]:
    """Returns the files of all recipes by name; the name of a recipe in a subfolder begins with the folder."""
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
