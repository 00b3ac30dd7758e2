"""Errors that the project raises when a request cannot be met."""


class PartitionError(ValueError):
    """A module cannot be partitioned as the layout asks.

    Raised before training starts, and always with three things in the message: the module, the rule it breaks, and
    the layouts that do work.
    """


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file."""


class NonFiniteError(ArithmeticError):
    """A gradient or the loss is NaN or infinite; raised on all ranks, before any of them updates its weights."""


class RankError(RuntimeError):
    """The run has ended because of another rank; the message names the rank and the cause."""
