"""Batch statistics are those of all replicas, with gradients and gradients of gradients as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from lightning_hybrid._torch_private import default_group
from lightning_hybrid.patching import Patches
from lightning_hybrid.replicas.batch_norm import BatchStatistics
from tests.harness import RankGroup


@contextmanager
def shared() -> Iterator[None]:
    patches, statistics = Patches(), BatchStatistics(default_group())
    statistics.patch(patches)
    patches.apply()
    try:
        with statistics.in_step():
            yield
    finally:
        patches.restore()


def penalised(replicas: int = 1, rank: int = 0) -> list[torch.Tensor]:
    """Gradients of a loss with a penalty on the gradient of its input, of this replica's samples and of the weight."""
    torch.manual_seed(0)
    norm, x_NC = nn.BatchNorm1d(3), torch.randn(8, 3)
    x_NC = x_NC[rank::replicas].clone().requires_grad_()
    if replicas > 1:
        with shared():
            out = norm(x_NC)
    else:
        out = norm(x_NC)
    (slope_NC,) = torch.autograd.grad(out.pow(3).sum(), x_NC, create_graph=True)
    (out.sin().sum() + slope_NC.square().sum()).backward()
    assert x_NC.grad is not None
    assert norm.weight.grad is not None
    return [x_NC.grad, norm.weight.grad]


def penalised_on_ranks() -> list[torch.Tensor]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return penalised(dist.get_world_size(), dist.get_rank())


def test_a_penalty_on_gradients_through_batch_norm(ranks2: RankGroup):
    x_grad_NC, weight_grad_C = penalised()
    results = ranks2.call(penalised_on_ranks)
    for rank, (part_NC, _) in enumerate(results):
        torch.testing.assert_close(part_NC, x_grad_NC[rank::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][1] + results[1][1], weight_grad_C, rtol=1e-4, atol=1e-5)
