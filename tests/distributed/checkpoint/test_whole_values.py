"""What hooks and callbacks put into a checkpoint is whole, in the order of the model, under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid.checkpoint.consolidate import consolidate
from tests.distributed.contract.hook_jobs import Fused
from tests.distributed.engine.state_jobs import Plain, data
from tests.distributed.jobs import quiet, trainer_for
from tests.harness import RankGroup
from tests.pairwise import quick


def _with_copies(module: Any, checkpoint: dict[str, Any]) -> None:
    copies = [parameter.detach().clone() for parameter in module.parameters()]
    checkpoint["mine"] = {"copies": copies, "largest": copies[-1].abs().max(), "number": len(copies)}


class Copies(Plain):
    def on_save_checkpoint(self, checkpoint):
        _with_copies(self, checkpoint)


class FusedCopies(Fused):
    def on_save_checkpoint(self, checkpoint):
        _with_copies(self, checkpoint)


class KeepsCopies(L.Callback):
    """Saves copies that it has made in a hook before."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.copies = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def state_dict(self):
        return {"copies": self.copies}


def save(layout: str | None, kind: str, path: str) -> None:
    """Trains, and saves at the end of the first epoch."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = {"Copies": Copies, "FusedCopies": FusedCopies, "KeepsCopies": Plain, "Fused": Fused}[kind]()
    saver = LambdaCallback(on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(path))
    callbacks = [saver, KeepsCopies()] if kind in ("KeepsCopies", "Fused") else [saver]
    trainer, replicas = trainer_for(layout, callbacks=callbacks)
    tokens = TensorDataset(torch.randint(16, (12, 8), generator=torch.Generator().manual_seed(1)))
    trainer.fit(module, DataLoader(tokens, batch_size=4 // replicas) if "Fused" in kind else data(replicas))


@pytest.mark.feature("values that hooks and callbacks save")
@pytest.mark.parametrize(
    ("layout", "kind"),
    quick(
        [(y, k) for y in ("dp2", "fsdp2", "tp2", "pp2") for k in ("Copies", "FusedCopies", "KeepsCopies", "Fused")],
        ("fsdp2", "Copies"),
        ("tp2", "FusedCopies"),
        ("pp2", "KeepsCopies"),
    ),
)
def test_values_are_those_of_one_process(ranks2: RankGroup, tmp_path: Path, layout: str, kind: str) -> None:
    save(None, kind, str(tmp_path / "one.ckpt"))
    ranks2.call(save, layout, kind, str(tmp_path / "many.ckpt"))
    consolidate(tmp_path / "many.ckpt", tmp_path / "many_whole.ckpt")
    one, many = (torch.load(tmp_path / name, weights_only=False) for name in ("one.ckpt", "many_whole.ckpt"))
    key = "mine" if "mine" in one else "callbacks"
    torch.testing.assert_close(_tensors(many[key]), _tensors(one[key]), rtol=1e-4, atol=1e-5)


def _tensors(saved: Any) -> dict[str, Any]:
    """What was saved, of callbacks that of the one that keeps copies."""
    return next((v for k, v in saved.items() if "KeepsCopies" in k), saved)
