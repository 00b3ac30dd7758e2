"""Sums in bfloat16 over many ranks, which are simulated: one of them runs, and is told what the others send."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_hybrid.replicas import reduction
from lightning_hybrid.replicas.reduction import InBfloat16, InBfloat16AddedExactly

PER_RANK = 64


class Others:
    """In the place of `torch.distributed`, for rank 0 of many."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.bfloat16()

    def all_to_all_single(self, arrived: torch.Tensor, sent: torch.Tensor, **_: Any) -> Any:
        arrived.copy_(self._values[:, :PER_RANK].contiguous().view(torch.uint8).flatten())
        return SimpleNamespace(wait=lambda: None)

    def all_gather_single(self, gathered: torch.Tensor, own: torch.Tensor, **_: Any) -> None:
        gathered[: len(own)] = own

    def all_reduce(self, own: torch.Tensor, **_: Any) -> Any:
        """As a ring does it: one rank's after the other, each sum rounded."""
        total = self._values[0].clone()
        for other in self._values[1:]:
            total += other
        own.copy_(total)
        return SimpleNamespace(wait=lambda: None)


def error(kind: Any, ranks: int, monkeypatch: pytest.MonkeyPatch) -> float:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ranks, PER_RANK * ranks, generator=generator)
    others = Others(values)
    monkeypatch.setattr(reduction, "dist", others)
    monkeypatch.setattr(reduction, "all_gather_single", others.all_gather_single)
    flat = values[0].clone()
    kind().begin(flat, SimpleNamespace(size=lambda: ranks))()
    found, exact = flat[:PER_RANK].double(), values[:, :PER_RANK].double().sum(0)
    return float((found - exact).norm() / exact.norm())


def test_the_error_does_not_grow_with_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    added_exactly = [error(InBfloat16AddedExactly, ranks, monkeypatch) for ranks in (4, 16, 64, 256)]
    added_short = [error(InBfloat16, ranks, monkeypatch) for ranks in (4, 16, 64, 256)]
    assert max(added_exactly) < 3e-3
    assert added_exactly[-1] < 1.3 * added_exactly[0]
    assert added_short[-1] > 3 * added_short[0]
    assert added_short[-1] > 4 * added_exactly[-1]


def test_bytes() -> None:
    assert InBfloat16().sent_bytes(100, 4, 4) == 300
    assert reduction.Exact().sent_bytes(100, 4, 4) == 600
