"""What a training step costs beside its arithmetic: reads of the device by the host, and small collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.contract_jobs import make_trainer, start

pytestmark = pytest.mark.distributed

WIDTH, BATCH = 64, 64
SMALL = 1024
"""Collectives of more elements carry gradients, weights or activations."""
WARM_UP = 3
"""Steps in which ranks still agree on what they log."""
STEPS = 4
"""Steps that are counted."""


class Costs(TorchDispatchMode):
    """Counts small collectives, and reads of tensors by the host; on the CPU every tensor counts as the device's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> Any:
        for name in ("tolist", "numpy", "cpu"):  # on the CPU they do not pass through the dispatcher
            self._originals[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counted(self._originals[name]))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)

    def _counted(self, original: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            self.counts["reads"] += 1
            return original(*args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"):
            self.counts["reads"] += 1
        elif name.startswith(("c10d::", "_c10d_functional::")) and not any(x in name for x in ("send", "recv", "wait")):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.counts["collectives"] += max((t.numel() for t in tensors), default=0) <= SMALL
        return func(*args, **(kwargs or {}))


class Module(L.LightningModule):
    """Logs as many values as it is asked to."""

    def __init__(self, values: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self._values, self._options = values, options

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        x = batch
        for block in self.blocks:
            x = block(x)
        loss = (x - batch).square().mean()
        for i in range(self._values):
            self.log(f"value {i}", loss * i, **self._options)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counting(L.Callback):
    """Counts the steps between the warm-up and the last one."""

    def __init__(self) -> None:
        self.costs = Costs()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self.costs.__enter__()
        if batch_idx == WARM_UP + STEPS:
            self.costs.__exit__(None, None, None)


def costs(layout: str | None, values: int, options: dict[str, Any], **trainer_options: Any) -> dict[str, float]:
    """Reads and small collectives of a step, on average."""
    start()
    counting = Counting()
    trainer, replicas = make_trainer(
        layout, callbacks=[counting], max_steps=WARM_UP + STEPS + 1, log_every_n_steps=1000, **trainer_options
    )
    data = torch.utils.data.DataLoader(torch.randn(BATCH * 16, WIDTH), batch_size=BATCH // replicas)
    trainer.fit(Module(values, options), data)
    return {kind: counting.costs.counts[kind] / STEPS for kind in ("reads", "collectives")}
