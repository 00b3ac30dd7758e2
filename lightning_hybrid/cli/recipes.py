"""`recipes ls`, `recipes cp NAME [FOLDER]`, `recipes show NAME [--sample]`: example configurations."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from lightning_hybrid.cli.errors import ArgumentParser, CommandError
from lightning_hybrid.cli.recipe_files import recipe_path, recipes

_SUMMARY_LENGTH = 90
"""Characters of a description."""
_SAMPLES = 3


def run(name: str, args: list[str]) -> None:
    """Runs `recipes ls|cp|show`."""
    parser = ArgumentParser(prog=f"lightning-hybrid {name}", description="Example configurations for `fit --config`.")
    actions = parser.add_subparsers(dest="action", required=True, parser_class=ArgumentParser)
    actions.add_parser("ls", description="Lists the recipes.", help="list the recipes")
    copied = actions.add_parser("cp", description="Copies a recipe.", help="copy a recipe into a folder")
    copied.add_argument("recipe", help="its name, as `recipes ls` shows it")
    copied.add_argument("folder", nargs="?", type=Path, default=Path(), help="the folder; default: the current one")
    shown = actions.add_parser("show", description="Prints a recipe.", help="print a recipe")
    shown.add_argument("recipe", help="its name, as `recipes ls` shows it, or a file")
    shown.add_argument(
        "--sample",
        nargs="?",
        type=int,
        const=_SAMPLES,
        metavar="COUNT",
        help=f"print the first training samples (default: {_SAMPLES}) with their loss mask instead; "
        "options of `fit`, such as `--data.path FILE`, override the recipe",
    )
    parsed, overrides = parser.parse_known_args(args)
    if overrides and getattr(parsed, "sample", None) is None:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if parsed.action == "ls":
        _list()
    elif parsed.action == "show" and parsed.sample is not None:
        from lightning_hybrid.cli import samples  # imports torch

        samples.show(parsed.recipe, overrides, parsed.sample)
    elif parsed.action == "show":
        sys.stdout.write(_file(parsed.recipe).read_text())
    else:
        _copy(parsed.recipe, parsed.folder)


def _file(name: str) -> Path:
    return Path(name) if Path(name).is_file() else recipe_path(name)


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
