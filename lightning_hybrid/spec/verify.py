"""`verify`: when a run compares a training step with one process."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EVERY = re.compile(r"every (\d+) steps?")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """When a run compares a training step with one process, and what it does about a difference."""

    at_start: bool = True
    """Verify before the first update."""
    every: int | None = None
    """Verify again after this number of batches; None: only at the start."""
    strict: bool = False
    """Refuse a loss that is no mean over samples, instead of a warning."""

    @classmethod
    def parse(cls, text: str) -> Verify:
        """Returns the options that `text` names.

        Args:
            text: `"start"`, `"strict"`, `"off"`, or `"every N steps"`, which includes the start.

        Raises:
            ValueError: If `text` is something else.
        """
        if text == "off":
            return cls(at_start=False)
        if text in ("start", "strict"):
            return cls(strict=text == "strict")
        found = _EVERY.fullmatch(text) if isinstance(text, str) else None
        if found is None or int(found[1]) < 1:
            raise ValueError(f"`verify` must be 'start', 'strict', 'off' or 'every N steps' with N >= 1. Got {text!r}.")
        return cls(every=int(found[1]))
