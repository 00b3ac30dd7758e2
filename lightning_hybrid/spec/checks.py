"""Checks of plain data."""

from __future__ import annotations

from lightning_hybrid.spec.stages import SCHEDULES


def check_at_least(values: object, least: int, *names: str) -> None:
    """Checks that the attributes `names` of `values` are None or at least `least`.

    Raises:
        ValueError: If an attribute is smaller.
    """
    for name in names:
        value = getattr(values, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}. Got {value}.")


def check_choices(schedule: str, microbatches: int | str, recompute: str | None) -> None:
    """Checks the fields that a request and a plan have in common.

    Raises:
        ValueError: If a value is not one of its possible values.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}. Got {schedule!r}.")
    if microbatches != "auto" and (type(microbatches) is not int or microbatches < 1):
        raise ValueError(f"`microbatches` must be 'auto' or a whole number of at least 1. Got {microbatches!r}.")
    if recompute not in (None, "selective", "full"):
        raise ValueError(f"`recompute` must be None, 'selective' or 'full'. Got {recompute!r}.")
