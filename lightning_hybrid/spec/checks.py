"""Checks of plain data."""

from __future__ import annotations


def check_at_least(values: object, least: int, *names: str) -> None:
    """Whether these attributes, where they are not None, are at least so large.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        value = getattr(values, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}. Got {value}.")
