"""The rows that each rank of `fsdp` has are those of `torch.chunk`, also where their number cannot be divided."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from lightning_hybrid.parallelize.placement import _chunk


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("runs", [((0, 8),), ((0, 5),), ((3, 4),), ((0, 3), (6, 10)), ((2, 3), (5, 6), (8, 13))])
def test_chunks_are_those_of_torch(runs: tuple[tuple[int, int], ...], ranks: int) -> None:
    rows = list(chain.from_iterable(range(start, stop) for start, stop in runs))
    expected = [part.tolist() for part in torch.tensor(rows).chunk(ranks)]
    expected += [[]] * (ranks - len(expected))
    for rank, wanted in enumerate(expected):
        assert list(chain.from_iterable(range(a, b) for a, b in _chunk(runs, ranks, rank))) == wanted
