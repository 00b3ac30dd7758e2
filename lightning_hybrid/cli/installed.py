"""Versions of installed packages, and requirements of this package that are not met."""

from __future__ import annotations

from importlib import metadata

NAME = "lightning-hybrid"


def version(package: str) -> str | None:
    """Returns the version of an installed package, or None; imports nothing of it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing() -> dict[str, list[str]]:
    """Returns requirements that are not met, by extra; those of the package itself under an empty text."""
    from packaging.requirements import Requirement

    found: dict[str, list[str]] = {"": []}
    if version(NAME) is None:
        return found
    for extra in metadata.metadata(NAME).get_all("Provides-Extra") or []:
        found[extra] = []
    for text in metadata.requires(NAME) or []:
        requirement = Requirement(text)
        for extra, texts in found.items():
            marker = requirement.marker
            if extra and (marker is None or marker.evaluate({"extra": ""})):
                continue  # of the package itself
            if marker is None or marker.evaluate({"extra": extra}):
                has = version(requirement.name)
                if has is None or not requirement.specifier.contains(has, prereleases=True):
                    texts.append(f"{requirement.name}{requirement.specifier} (here: {has or 'none'})")
    return found
