"""Differentiable collectives of tensor parallelism; each is the backward of another, so gradients have gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Sum.apply(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Copy.apply(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Part.apply(gradients[0], ctx.dim, ctx.group), None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        length = tensor.shape[dim] // group.size()
        return tensor.narrow(dim, group.rank() * length, length).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Gather.apply(gradients[0], ctx.dim, ctx.group), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        return tensor * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _Alias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class _CopyChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, channels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.channels, ctx.group = channels, group
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = _Sum.apply(gradients[0].index_select(-1, ctx.channels), ctx.group)
        return gradients[0].index_copy(-1, ctx.channels, total), None, None  # type: ignore[arg-type]


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, dim: int, index: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.dim, ctx.index, ctx.group, ctx.shape = dim, index, group, tensor.shape
        return tensor.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        whole = gradients[0].new_zeros(ctx.shape).index_add(ctx.dim, ctx.index, gradients[0])
        return _Sum.apply(whole, ctx.group), None, None, None


def all_gather(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Gathers `tensor` of all ranks and concatenates along `dim` in order of rank."""
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts, dim)


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `tensor` with the same memory, to which user code may write in place: for autograd it is not a view."""
    return _Alias.apply(tensor)


def copy_to_ranks(tensor: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Returns `tensor`, equal on all ranks, for use in a divided region; the gradients of all ranks are summed."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    return _Copy.apply(tensor, group)


def copy_channels_to_ranks(tensor: torch.Tensor, channels: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Applies `copy_to_ranks` to `channels` of the last dim; gradients of the others are equal on all ranks."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    return _CopyChannels.apply(tensor, channels, group)


def select_on_rank(tensor: torch.Tensor, dim: int, index: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Returns the entries `index` of `tensor`, which is equal on all ranks; the gradients of all ranks are summed."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor.index_select(dim, index)
    return _Select.apply(tensor, dim, index, group)


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Returns the sum of `tensor` over the ranks, equal on all ranks."""
    return _Sum.apply(tensor, group)


def gather_from_ranks(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> Any:
    """Returns `tensor` of all ranks concatenated along `dim`, equal on all ranks."""
    return _Gather.apply(tensor, dim, group)


def divided_by_ranks(bias: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Scales a bias that every rank adds before a sum over ranks; the gradient is that of one whole bias."""
    return _Scale.apply(bias, 1.0 / group.size())
