"""How checkpoints are saved and what is trusted when they are loaded."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Options of `HybridStrategy(checkpoints=...)`.

    Raises:
        ValueError: If an option is not one of its possible values.
    """

    asynchronous: bool = False
    """Training goes on as soon as the state has been copied to host memory; a thread writes it. There is room for one
    save at a time: a second one waits for the first."""
    keep: int = 1
    """The newest `keep` valid checkpoints of a folder are never removed, whatever a callback asks: with 2, there is one
    to fall back to when the newest is damaged."""
    on_error: Literal["warn", "raise"] = "warn"
    """What happens when a checkpoint cannot be written (disk full): a warning, and training goes on; or an error on all
    ranks. Earlier checkpoints are left as they are in both cases."""
    trust_pickle: bool = False
    """Whether to run the pickle of files that need it. It can execute any code: only for files that you trust."""

    def __post_init__(self) -> None:
        if not isinstance(self.keep, int) or isinstance(self.keep, bool) or self.keep < 1:
            raise ValueError(f"`keep` must be a whole number of at least 1. Got {self.keep!r}.")
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"`on_error` must be 'warn' or 'raise'. Got {self.on_error!r}.")
