"""Tensors that the user keeps on another device than the weights stay there under `fsdp`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_hybrid._torch_private import keep_inputs
from tests.distributed.replicas.module_jobs import fit
from tests.harness import RankGroup


def moved_by_fully_shard(kept: bool) -> bool:
    """Whether a fully sharded module moves its inputs; on the CPU, where torch does not, as on an accelerator."""
    if not torch.distributed.is_initialized():
        fit("Net", "fsdp2")
    from torch.distributed.fsdp._fully_shard import _fsdp_state

    seen: list[Any] = []

    class Sees(nn.Linear):
        def forward(self, x: dict[str, Any]) -> torch.Tensor:
            seen.append(x["lengths"])
            return super().forward(x["data"])

    module: Any = fully_shard(Sees(4, 4))
    if kept:
        keep_inputs(module)
    lengths = torch.tensor([3, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
        patch.setattr(
            _fsdp_state,
            "_to_kwargs",
            lambda args, kwargs, *_: (
                [({k: v.clone() for k, v in args[0].items()},)],
                [kwargs],
            ),
        )
        module({"data": torch.randn(2, 4), "lengths": lengths})
    return seen[0] is not lengths


@pytest.mark.slow
def test_inputs_are_not_moved(ranks2: RankGroup) -> None:
    assert ranks2.call(moved_by_fully_shard, False) == [True, True]
    assert ranks2.call(moved_by_fully_shard, True) == [False, False]
