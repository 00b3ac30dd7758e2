"""The reducer against plain averages: unused parameters, accumulation, buckets; and logs that do not match."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_hybrid._torch_private import default_group
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.metrics.logs import LogRecorder
from lightning_hybrid.metrics.reduction import reduce_over_replicas
from lightning_hybrid.replicas import reducer as gradients
from lightning_hybrid.replicas.reducer import ReplicaReducer, sum_over_holders
from lightning_hybrid.spec.layout import Layout
from tests.harness import RankError, RankGroup


def connect() -> int:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.common, self.even, self.odd, self.never = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, index):
        x = self.common(x)
        return (self.even(x) if index % 2 == 0 else self.odd(x)).square().mean()


def reduce_branches(bucket_bytes: int, accumulate: bool) -> dict[str, torch.Tensor | None]:
    rank = connect()
    model = Branches()
    gradients.BUCKET_BYTES = bucket_bytes
    reducer = ReplicaReducer(model.parameters(), default_group(), 2)
    reducer.overlap()
    x = torch.arange(8.0).view(2, 4) + rank
    if accumulate:
        reducer.enabled = False
        model(x, 0).backward()
        reducer.enabled = True
    model(x, rank).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("bucket_bytes", [100, 25 * 2**20])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_mean_over_replicas_that_use_different_parameters(ranks2: RankGroup, bucket_bytes, accumulate):
    model = Branches()
    for rank in range(2):
        x = torch.arange(8.0).view(2, 4) + rank
        if accumulate:
            (model(x, 0) / 2).backward()
        (model(x, rank) / 2).backward()
    for reduced in ranks2.call(reduce_branches, bucket_bytes, accumulate):
        for name, parameter in model.named_parameters():
            if name.startswith("never"):
                assert reduced[name] is None, "used on no replica: an optimizer must skip it"
            else:
                torch.testing.assert_close(reduced[name], parameter.grad)


def sum_shared() -> torch.Tensor:
    rank = connect()
    weight = nn.Parameter(torch.zeros(3))
    if rank == 1:
        weight.grad = torch.ones(3)
    sum_over_holders({"w": default_group()}, lambda name: weight)
    return weight.grad if weight.grad is not None else weight


def test_shared_weights_get_the_sum_of_their_holders(ranks2: RankGroup):
    for gradient in ranks2.call(sum_shared):
        assert torch.equal(gradient, torch.ones(3))


def log(keys: dict[int, list[str]], count: int = 1) -> dict[str, float]:
    rank = connect()
    mesh = Mesh.create(Layout(dp=2), "cpu")
    recorder = LogRecorder(nn.Module())  # type: ignore[arg-type]  -- any module has the `log` attribute it sets
    with recorder.recording(samples=1 + 2 * rank):
        for key in keys[rank]:
            for i in range(count):
                recorder.root.log(f"{key}{i}", float(rank))
                recorder.root.log(f"{key}{i} max", float(rank), reduce_fx="max")
                recorder.root.log(f"{key}{i} sum", 1.0, reduce_fx="sum")
    entries = recorder.reduced()
    reduce_over_replicas(entries, mesh, torch.device("cpu"))
    return {e.name: float(e.value) / (e.weight if e.reduction == "mean" else 1) for e in entries}


@pytest.mark.parametrize("count", [1, 40])
def test_logged_values_are_weighted_by_samples(ranks2: RankGroup, count):
    for values in ranks2.call(log, {0: ["a"], 1: ["a"]}, count):
        assert values[f"a{count - 1}"] == pytest.approx(0.75)
        assert values[f"a{count - 1} max"] == 1
        assert values[f"a{count - 1} sum"] == 2


def test_different_keys_are_an_error_on_every_replica_not_a_hang(ranks2: RankGroup):
    with pytest.raises(RankError, match=r"same keys on every replica.*'a0'.*'b0'"):
        ranks2.call(log, {0: ["a"], 1: ["b"]})
