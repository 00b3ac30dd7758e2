"""The one rule of when a batch must stay whole: the step does something for the whole batch once."""

from __future__ import annotations

from torch import nn

from lightning_hybrid._torch_private import BatchNorm
from lightning_hybrid.ghosts.contract import StepContract
from lightning_hybrid.replicas.batch_norm import has_batch_norm


def whole_batch_reason(root: nn.Module, contract: StepContract) -> str | None:
    """Returns why a pipeline cannot split batches into microbatches; None if it can.

    Args:
        root: The LightningModule.
        contract: The contract of the training step, as far as it is known.
    """
    norm = next((n for n, m in root.named_modules() if isinstance(m, BatchNorm)), None)
    if norm is not None:
        return f"`{norm}` is a BatchNorm, whose statistics are those of the whole batch"
    if has_batch_norm(root):
        return "the step normalizes with the statistics of the whole batch, or calls `all_gather`"
    if contract.of_batch:
        more = len(contract.of_batch) - 1
        return f"{contract.of_batch[0]}, once for the whole batch{f' (and {more} more)' if more else ''}"
    if contract.by_values is not None:
        return contract.by_values
    if contract.weights:
        name, where = contract.weights[0]
        return f"{where} writes the weight `{name}`, once for the whole batch"
    return None


def refusal_of_microbatches(asked: int | str, reason: str) -> str:
    """Returns the message of an error for a request of more than one microbatch."""
    return (
        f"`microbatches={asked}` cannot give the result of one process: {reason}, and a pipeline runs the step once "
        "for each microbatch. Use `microbatches=1` or 'auto'."
    )
