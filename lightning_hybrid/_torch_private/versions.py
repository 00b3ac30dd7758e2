"""The releases of torch that this package was tested with."""

from __future__ import annotations

import warnings

import torch

TESTED_TORCH = ("2.13",)
"""Releases with which the tests have passed, oldest first. pyproject.toml allows 2.11 and 2.12, too: they are accepted
without a warning, but no tests have run with them yet. A release is added once its tests have passed."""


def warn_if_untested() -> None:
    """Warns once if torch is newer than the releases this version was tested with."""
    release = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if release > tuple(int(x) for x in TESTED_TORCH[-1].split(".")):
        warnings.warn(
            f"lightning_hybrid was tested with torch {' and '.join(TESTED_TORCH)}; this is torch {torch.__version__}.",
            stacklevel=2,
        )
