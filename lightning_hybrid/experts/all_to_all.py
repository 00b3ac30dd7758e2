"""Rows that go from every rank of a group to every other, and their gradients that come back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _AllToAll.apply(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Any:
    """Sends the first rows to the first rank, and so on; gives the rows that have arrived, in order of rank.

    Args:
        rows: Shape `(sum(sent), ...)`.
        sent: How many rows go to each rank.
        received: How many rows come from each.
        group: The ranks.
    """
    return _AllToAll.apply(rows, sent, received, group)
