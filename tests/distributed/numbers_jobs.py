"""Modules and calls for the tests of dropout, precision, gradients and optimizers; they run on every rank."""

from __future__ import annotations

import random
import zlib
from functools import partial
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_hybrid.analyze.ghost import Ghost
from tests.distributed.jobs import WIDTH, Numbers, quiet, trainer_for, weights


class NoisyBlock(nn.Module):
    """A divided region with dropout in it, and dropout of what all ranks hold whole."""

    def __init__(self, inside: float, outside: float, part: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.inside, self.outside, self.part = nn.Dropout(inside), nn.Dropout(outside), part

    def region(self, x):
        return self.down(self.inside(torch.tanh(self.up(x))))

    def forward(self, x):
        y = checkpoint(self.region, x, use_reentrant=False) if self.part else self.region(x)
        return x + self.outside(y)


class Noisy(L.LightningModule):
    """Dropout everywhere: in blocks, in free code between modules, in the step.

    Args:
        inside: Dropout of what `tp` divides.
        outside: Dropout of everything else.
        recompute: What is checkpointed: nothing, `block` (reentrant or not) or `part`, a region inside a block.
    """

    def __init__(self, inside: float = 0.0, outside: float = 0.0, recompute: str = "") -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(NoisyBlock(inside, outside, recompute == "part") for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)
        self.outside, self.recompute = outside, recompute
        self.masks: list[int] = []
        self.inner_masks: list[int] = []
        self.streams: list[int] = []
        self.losses: list[float] = []
        for name, module in self.named_modules():
            if name.endswith("side"):
                kept = self.masks if name.endswith("outside") else self.inner_masks
                module.register_forward_hook(partial(self._note, kept))

    def _note(self, masks: list[int], module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        if module.training and not isinstance(out, Ghost):
            masks.append(_crc(out != 0))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = nn.functional.dropout(x, self.outside, self.training)
            if self.recompute.startswith("block"):
                x = checkpoint(block, x, use_reentrant=self.recompute == "block, reentrant")
            else:
                x = block(x)
        return self.head(nn.functional.dropout(x, self.outside, self.training))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        if not isinstance(loss, Ghost):
            self.streams.append(_crc(torch.get_rng_state()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("noise", self(batch["x"]).mean() + torch.randn(()))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        results: Any = outputs
        self.losses.append(float(results["loss"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().numpy().tobytes())


def shared_streams() -> tuple[int, int, int]:
    """Checksums of the streams that are no step's own."""
    state: Any = np.random.get_state()
    return _crc(torch.get_rng_state()), hash(random.getstate()), zlib.crc32(state[1].tobytes())


def dropout(
    layout: str,
    module_options: dict[str, Any],
    *,
    samples: int = 48,
    ckpt_path: str | None = None,
    save: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains with dropout; what was drawn, and what the shared streams are like afterwards."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Noisy(**module_options)
    streams: list[Any] = []
    watch = LambdaCallback(on_train_batch_end=lambda *_: streams.append(shared_streams()))
    trainer, replicas = trainer_for(layout, callbacks=[watch], **options)
    size = 16 // replicas
    trainer.fit(
        module,
        DataLoader(Numbers(samples), batch_size=size),
        DataLoader(Numbers(16), batch_size=size),
        ckpt_path=ckpt_path,
    )
    if save is not None:
        trainer.save_checkpoint(save)
    return {
        "weights": weights(trainer, module),
        "losses": module.losses,
        "masks": module.masks,
        "inner": module.inner_masks,
        "in step": module.streams,
        "shared": streams,
        "noise": float(trainer.callback_metrics["noise"]),
    }
