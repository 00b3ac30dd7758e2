"""Several ranks on one device over gloo: shows that CUDA streams and sharding are right, and nothing about speed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CUDAAccelerator

from lightning_hybrid import HybridStrategy, Layout
from tests.benchmarks.contestants import SEED, Model, Size, loader
from tests.zoo.reference import Recorder, Run, full_state

SMALL = Size(vocabulary=64, width=32, blocks=4, heads=4, time=16, batch=8)
STEPS = 3


class OneGpu(CUDAAccelerator):
    """All ranks are on the first GPU; Lightning's own accelerator refuses more ranks than GPUs."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """As many ranks as asked for."""
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """The same GPU for each."""
        return [torch.device("cuda", 0) for _ in devices]


class PlainDescent(Model):
    """With SGD, whose updates are as exact as the gradients."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """All weights in one group."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(layout: str | None, device: str) -> Run:
    """Trains a small model; runs on every rank.

    Args:
        layout: None for one process with Lightning's own strategy.
        device: `"cuda"`, all ranks on the first GPU, or `"cpu"`.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(SEED, verbose=False)
    parsed = Layout.parse(layout) if layout else Layout()
    strategy: Any = HybridStrategy(layout=layout, process_group_backend="gloo", microbatches=_microbatches(parsed))
    recorder = Recorder()
    trainer = L.Trainer(
        strategy=strategy if layout else "auto",
        accelerator=OneGpu() if device == "cuda" else "cpu",
        devices=parsed.devices,
        max_steps=STEPS,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with point_to_point_over_host():
        trainer.fit(PlainDescent(SMALL), loader(SMALL, STEPS, replicas=parsed.replicas))
        recorder.run.final = full_state(trainer)
    return recorder.run


def _microbatches(layout: Layout) -> Any:
    return SMALL.microbatches if layout.pp > 1 else "auto"


@contextmanager
def point_to_point_over_host() -> Iterator[None]:
    """Inside, tensors are sent and received through host memory: gloo's send and receive take host pointers only."""
    send, receive = dist.isend, dist.irecv

    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return send(torch.empty_like(tensor, device="cpu").copy_(tensor.detach()), *args, **kwargs)

    def irecv(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        host = torch.empty_like(tensor, device="cpu")
        return _Arrival(receive(host, *args, **kwargs), host, tensor)

    core = "torch.distributed.distributed_c10d"
    with (
        patch(f"{core}.isend", isend),
        patch(f"{core}.irecv", irecv),
        patch("torch.distributed.isend", isend),
        patch("torch.distributed.irecv", irecv),
    ):
        yield


class _Arrival:
    """A receive that ends with the copy to the device."""

    def __init__(self, work: Any, host: torch.Tensor, tensor: torch.Tensor) -> None:
        self._work, self._host, self._tensor = work, host, tensor

    def wait(self) -> None:
        """Until the tensor is there."""
        self._work.wait()
        with torch.no_grad():
            self._tensor.copy_(self._host)
