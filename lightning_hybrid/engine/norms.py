"""Norms of whole gradients, wherever their parts are."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.collectives import to_local
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.parallelize.placement import writes

PREFIX = "grad_2.0_norm"
"""As `lightning.pytorch.utilities.grad_norm(module, 2)` names them."""


def gradient_norms(runner: StepRunner) -> dict[str, Tensor]:
    """The 2-norm of every parameter's gradient, and of all together, the same on every rank. Collective.

    Each part of a gradient is counted by one of the ranks that have it; one all-reduce adds up the squares.
    """
    names, local = runner.partition.parameters.names, runner.partition.parameters.local()
    squares = torch.zeros(len(names), 2, dtype=torch.float64, device=runner.device)  # and whether there is a gradient
    for i, name in enumerate(names):
        gradient = local[name].grad if name in local else None
        if gradient is not None:
            squares[i, 1] = 1
            if writes(runner.partition, name):
                squares[i, 0] = torch.linalg.vector_norm(to_local(gradient).detach(), dtype=torch.float64).square()
    dist.all_reduce(squares)
    there = squares[:, 1].tolist()
    norms = {f"{PREFIX}/{n}": squares[i, 0].sqrt().float() for i, n in enumerate(names) if there[i]}
    return norms | ({f"{PREFIX}_total": squares[:, 0].sum().sqrt().float()} if norms else {})
