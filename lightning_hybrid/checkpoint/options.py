"""Options of saving and loading checkpoints."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Options of `HybridStrategy(checkpoints=...)`.

    Raises:
        ValueError: If an option is not one of its possible values.
    """

    asynchronous: bool = False
    """True if training continues after the state has been copied to host memory, while a thread writes the copy. One
    save runs at a time: a second one waits for the first."""
    keep: int = 1
    """Number of the newest valid checkpoints of a folder that are never removed, even if a callback asks for that: with
    2, there is a fallback if the newest is damaged."""
    on_error: Literal["warn", "raise"] = "warn"
    """Policy for checkpoints that cannot be written (disk full): warn and continue training, or raise on all ranks.
    Earlier checkpoints are unchanged in both cases."""
    reference_bytes: int | None = None
    """Size of a checkpoint from which `WandbLogger(log_model=...)` logs a reference to its folder instead of uploading
    its files; None: all checkpoints are uploaded."""
    trust_pickle: bool = False
    """True if pickles in checkpoints are run. Pickles can execute any code: use only for files that you trust."""

    def __post_init__(self) -> None:
        if not isinstance(self.keep, int) or isinstance(self.keep, bool) or self.keep < 1:
            raise ValueError(f"`keep` must be a whole number of at least 1. Got {self.keep!r}.")
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"`on_error` must be 'warn' or 'raise'. Got {self.on_error!r}.")
