"""For `AdaptiveBatchSize`: what a rank runs at once, in samples or in tokens, found before training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_hybrid.adapt.division import micro_batch_sizes
from lightning_hybrid.execute.batch_control import BatchControl
from lightning_hybrid.observe.memory import share_of_memory

LADDER = 64
"""Sizes are tried up to so many times the first one, where nothing else limits them."""

Memory = int | float | Literal["device"]


def budget_of(memory: Memory, device: torch.device) -> int | None:
    """Bytes that a rank may use; None: what the device has."""
    if isinstance(memory, float):
        return share_of_memory(device, memory)
    return None if isinstance(memory, str) else memory


def find_samples(control: BatchControl, memory: Memory, device: torch.device, batches: Sequence[int]) -> int:
    """The largest micro-batch that fits on all ranks and that one of these global batches can be made of. Collective.

    Args:
        control: Of the batches.
        memory: What a rank may use (see `AdaptiveBatchSize`).
        device: This rank's.
        batches: Global batch sizes, in samples.
    """
    sizes = micro_batch_sizes(batches, control.limits(max(batches), 1))
    found = control.find_micro_batch(sizes, budget_of(memory, device))
    rank_zero_info(
        f"AdaptiveBatchSize: micro-batches of up to {found.size} samples fit; rank {found.limited_by} has no "
        f"memory for more. Peak on rank 0: {found.measured_bytes / 2**20:.0f} MiB."
    )
    return found.size


def find_tokens(control: BatchControl, memory: Memory, device: torch.device, max_batch_size: int | None) -> int:
    """The largest token budget of a replica's batch that fits on all ranks. Collective.

    Args:
        control: Of batches that have a budget.
        memory: What a rank may use.
        device: This rank's.
        max_batch_size: The limit of a global batch, in tokens.
    """
    limit = LADDER * control.first.batch_size
    if max_batch_size is not None:
        limit = max_batch_size // (control.replicas * control.division.accumulate)
    tokens = control.find_token_budget(limit, budget_of(memory, device))
    rank_zero_info(f"AdaptiveBatchSize: batches of up to {tokens} tokens fit.")
    return tokens


def warn_of_memory(control: BatchControl, rank: int) -> None:
    """Says how a run that has ended without memory on this rank goes on."""
    size, unit = control.division.micro_batch_size, "samples" if control.budget is None else "tokens"
    warnings.warn(
        f"AdaptiveBatchSize: rank {rank} ran out of memory with micro-batches of {size} {unit}. Restart from the last "
        f"checkpoint with `max_micro_batch_size={max(1, size // 2)}`; the global batch stays.",
        stacklevel=2,
    )
