"""W&B's histograms of a partitioned module are those of the local tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_hybrid.metrics.loggers import watched_parts
from tests.harness import start_fake_ranks


class History:
    """Keeps the tensors of which W&B would make histograms."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}

    def log_tensor_stats(self, tensor: Any, name: str) -> None:
        self.tensors[name] = tensor


def trainer_with(experiment: Any) -> Any:
    return SimpleNamespace(loggers=[WandbLogger(experiment=experiment)], is_global_zero=True)


@pytest.fixture
def mesh() -> DeviceMesh:
    start_fake_ranks(2)
    return init_device_mesh("cpu", (2,))


def test_watching_reads_the_local_part_until_the_end(mesh: DeviceMesh) -> None:
    part, history = torch.arange(6.0).reshape(2, 3), History()
    weight = DTensor.from_local(part, mesh, [Shard(0)])
    with watched_parts(trainer_with(SimpleNamespace(_torch=history))):
        history.log_tensor_stats(weight, "sharded")
        history.log_tensor_stats(part, "plain")
    history.log_tensor_stats(weight, "afterwards")
    assert type(history.tensors["sharded"]) is torch.Tensor
    assert torch.equal(history.tensors["sharded"], part)
    assert history.tensors["plain"] is part
    assert history.tensors["afterwards"] is weight


def test_a_disabled_run_has_nothing_to_watch() -> None:
    with watched_parts(trainer_with(SimpleNamespace())):
        pass
