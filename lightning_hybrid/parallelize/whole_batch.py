"""The number of microbatches of a batch, and the one rule of when a batch must stay whole."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_hybrid._torch_private import BatchNorm
from lightning_hybrid.batches import find_samples
from lightning_hybrid.ghosts.contract import StepContract
from lightning_hybrid.replicas.batch_norm import has_batch_norm
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.request import Request
from lightning_hybrid.spec.stages import choose_microbatches


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
    if contract.indivisible is not None:
        return contract.indivisible
    if contract.decided_at is not None:
        return f"{contract.decided_at} decides by a value of the batch what the step computes"
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


def microbatches_for(
    root: pl.LightningModule,
    request: Request,
    batch: Any,
    known: int | None = None,
    contract: StepContract = StepContract(),  # noqa: B008 -- immutable
) -> int:
    """Returns the number of microbatches for a first batch like `batch`.

    Args:
        root: The LightningModule.
        request: The layout and its options.
        batch: The batch.
        known: Number of samples that were read for the batch; None: not known.
        contract: The contract of the step, as far as it is known.

    Raises:
        PartitionError: If the requested number does not suit the batch or the model.
    """
    layout, asked = request.layout, request.microbatches
    if layout.pp == 1:
        return 1
    whole = whole_batch_reason(root, contract) if root.training else None
    if asked == "auto":
        size = 1 if whole is not None else find_samples(batch, known).count or 1
        return choose_microbatches(size, asked, layout.pp, request.schedule)
    asked = int(asked)
    if asked == 1:
        return 1
    if whole is not None:
        raise PartitionError(refusal_of_microbatches(asked, whole))
    samples = find_samples(batch, known)
    size = samples.count
    if size is None:
        raise PartitionError(
            f"`microbatches={asked}` cannot split the batches into samples: {samples.obstacle}. A batch is split if "
            "all its tensors, and lists with an element for each sample, have the samples on dim 0. Use "
            "`microbatches=1` or 'auto', which does not split such batches."
        )
    if size < asked or size % asked:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        raise PartitionError(
            f"`microbatches={asked}` must divide the batch of each replica, which has {size} samples. "
            f"Use one of {divisors}, a larger batch, or 'auto'."
        )
    count = choose_microbatches(size, asked, layout.pp, request.schedule)
    if count != asked:
        raise PartitionError(
            f"`microbatches={asked}` with `schedule='{request.schedule}'` must be a multiple of its rounds of about "
            f"`pp={layout.pp}` microbatches. Use {count} or 'auto'."
        )
    return asked
