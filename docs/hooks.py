"""Hooks of mkdocs: the pages of the site that are files of the repository's root."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root; their links to `docs/` become links to neighbors."""
    for name in ROOT_PAGES:
        path = Path(config.config_file_path).parent / name
        text = path.read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files
