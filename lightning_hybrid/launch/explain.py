"""Errors of torch that user code causes by computing with divided weights, in the words of this package."""

from __future__ import annotations

from lightning_hybrid._torch_private import user_location_in
from lightning_hybrid.spec.errors import PartitionError

_MIXED = "got mixed torch.Tensor and DTensor"
_UNSUPPORTED = (
    "is not supported for tensor subclasses",
    "unsupported format string passed to DTensor",
    "Sharding propagation failed for",
)
"""Errors of operations that torch has not written for divided tensors."""


def explained(error: BaseException) -> BaseException:
    """Returns a `PartitionError` with the line of the user's code in place of torch's error; other errors unchanged."""
    if isinstance(error, PartitionError):
        return error
    if any(text in str(error) for text in _UNSUPPORTED):
        return PartitionError(
            f"`layout`: {user_location_in(error.__traceback__)} reads weights or gradients of which each rank has a "
            f"part, in a way that torch has not written for these: {str(error).splitlines()[0]} Use `.full_tensor()` "
            "of the weight or gradient first, on every rank, or a layout of `dp`."
        )
    if _MIXED not in str(error):
        return error
    return PartitionError(
        f"`layout`: {user_location_in(error.__traceback__)} computes with weights of which each rank has a part, and "
        "with others that each rank has whole. In a hook, `parameter.full_tensor()` returns a whole weight, on every "
        "rank, and `trainer.strategy.full_state_dict()` returns all of them on rank 0. Or compute in the step, where "
        "weights are whole under `fsdp`, or use a layout of `dp`."
    )
