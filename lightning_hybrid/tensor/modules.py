"""Hooks that make single modules tensor-parallel; those on outputs run before the hooks of the user."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_hybrid.tensor.collectives import (
    copy_channels_to_ranks,
    gather_from_ranks,
    select_on_rank,
    sum_over_ranks,
)

Active = Callable[[], bool]


def add_colwise(module: nn.Module, copied: Callable[[torch.Tensor], torch.Tensor], active: Active) -> RemovableHandle:
    """Copies the input of `module` to the ranks (`copied`); the output has this rank's channels."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        if not active():
            return None
        if args:
            return (copied(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": copied(kwargs["input"])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def add_row(module: nn.Module, group: dist.ProcessGroup, active: Active) -> RemovableHandle:
    """Sums the output of `module` over the ranks."""

    def after(_: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        return sum_over_ranks(output, group) if active() else None

    return module.register_forward_hook(after, prepend=True)


def add_gather(module: nn.Module, group: dist.ProcessGroup, active: Active) -> RemovableHandle:
    """Gathers the output channels of `module` from the ranks."""
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    dim = -1 - len(module.kernel_size) if convolution else -1

    def after(_: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        return gather_from_ranks(output, dim, group) if active() else None

    return module.register_forward_hook(after, prepend=True)


def add_shared_output(
    module: nn.Module, channels: tuple[int, ...], group: dist.ProcessGroup, active: Active
) -> RemovableHandle:
    """Sums gradients over the ranks for the output `channels` of a replicated linear used inside a region."""
    index = _index(channels)

    def after(_: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        return copy_channels_to_ranks(output, index(output.device), group) if active() else None

    return module.register_forward_hook(after, prepend=True)


def add_selected_output(
    module: nn.Module, channels: tuple[tuple[int, ...], ...], group: dist.ProcessGroup, active: Active
) -> RemovableHandle:
    """Selects the output `channels[rank]` of a replicated linear."""
    index = _index(channels[group.rank()])

    def after(_: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        return select_on_rank(output, -1, index(output.device), group) if active() else None

    return module.register_forward_hook(after, prepend=True)


def _index(channels: tuple[int, ...]) -> Callable[[torch.device], torch.Tensor]:
    """Returns a function that gives `channels` as a tensor on a device, created once per device."""
    return cache(lambda device: torch.tensor(channels, device=device))


def add_embedding(module: nn.Embedding, group: dist.ProcessGroup, active: Active) -> list[RemovableHandle]:
    """Looks up the ids of this rank's rows in `module`, and sums the results over the ranks."""
    length = module.num_embeddings // group.size()
    first = group.rank() * length
    padding = module.padding_idx
    own_padding = padding - first if padding is not None and first <= padding < first + length else None
    foreign: list[torch.Tensor] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        if not active():
            return None
        ids = args[0] if args else kwargs["input"]
        _check_ids(ids, length * group.size())
        foreign.append((ids < first) | (ids >= first + length))
        module.padding_idx = own_padding
        own = (ids - first).masked_fill(foreign[-1], 0)
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "input": own})

    def after(_: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        if not active():
            return None
        return sum_over_ranks(output.masked_fill(foreign[-1].unsqueeze(-1), 0.0), group)

    def always(_: nn.Module, args: tuple, output: Any) -> None:
        module.padding_idx = padding
        foreign.clear()

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, prepend=True),
        module.register_forward_hook(always, always_call=True),
    ]


def _check_ids(ids: torch.Tensor, rows: int) -> None:
    """Checks that `ids` are valid; a wrong id would read zeros. On the CPU only, to avoid waiting for a device.

    Raises:
        IndexError: If an id is out of range.
    """
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise IndexError(f"An id of an embedding with {rows} rows is out of range.")
