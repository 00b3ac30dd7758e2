"""Modules and calls for the tests of dropout, the guard and precision; they run on every rank."""

from __future__ import annotations

import random
import warnings
import zlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.launch.failures import RankFailed
from lightning_hybrid.spec.errors import NonFiniteError
from tests.distributed.jobs import WIDTH, Classifier, Numbers, quiet, trainer_for, weights


class NotedDropout(nn.Dropout):
    """Notes its masks; not by a hook, which `tp` would show whole values."""

    def forward(self, x):
        out = super().forward(x)
        if self.training and not isinstance(out, Ghost):
            DRAWN.inner.append(_crc(out != 0))
        return out


class NoisyBlock(nn.Module):
    """A divided region with dropout in it, and dropout of what all ranks hold whole."""

    def __init__(self, inside: float, outside: float, part: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.inside, self.outside, self.part = NotedDropout(inside), nn.Dropout(outside), part

    def region(self, x):
        return self.down(self.inside(torch.tanh(self.up(x))))

    def forward(self, x):
        y = checkpoint(self.region, x, use_reentrant=False) if self.part else self.region(x)
        return x + self.outside(y)


DRAWN = SimpleNamespace(masks=[], inner=[], in_step=[])
"""Checksums of what this rank has drawn; no container, since a pipeline shares those that a step changes."""


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
        self.losses: list[float] = []
        for name, module in self.named_modules():
            if name.endswith("outside"):
                module.register_forward_hook(partial(self._note, DRAWN.masks))

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
            DRAWN.in_step.append(_crc(torch.get_rng_state()))
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


def shared_rng() -> tuple[int, int, int]:
    """Checksums of the RNG state between steps."""
    state: Any = np.random.get_state()
    return _crc(torch.get_rng_state()), hash(random.getstate()), zlib.crc32(state[1].tobytes())


def dropout(
    layout: str,
    module_options: dict[str, Any],
    *,
    samples: int = 48,
    ckpt_path: str | None = None,
    save: str | None = None,
    seed: int = 7,
    **options: Any,
) -> dict[str, Any]:
    """Trains with dropout; what was drawn, and the shared RNG state afterwards."""
    quiet()
    L.seed_everything(seed, verbose=False)
    for drawn in vars(DRAWN).values():
        drawn.clear()
    module = Noisy(**module_options)
    states: list[Any] = []
    watch = LambdaCallback(on_train_batch_end=lambda *_: states.append(shared_rng()))
    options["strategy_options"] = {"verify": "off"} | options.get("strategy_options", {})  # which draws, too
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
        **{name: list(drawn) for name, drawn in vars(DRAWN).items()},
        "shared": states,
        "noise": float(trainer.callback_metrics["noise"]),
    }


class Plain(Classifier):
    """Blocks with a schedule of the learning rate for every step; one step can be poisoned.

    Args:
        poison: `""`, `"loss"` (of one sample), `"loss alone"` (and no gradient), or the name of a parameter, whose
            gradient is NaN on one rank.
        rank: Where.
        step: When.
        leave_out: For the reference in one process: the step is computed, but not taken.
        manual: Two optimizers, stepped by hand.
    """

    def __init__(
        self, *, poison: str = "", rank: int = 0, step: int = 1, leave_out: bool = False, manual: bool = False
    ) -> None:
        super().__init__()
        self.poison, self.rank, self.at, self.leave_out = poison, rank, step, leave_out
        self.automatic_optimization = not manual
        self.losses: list[float] = []
        self.batches = 0

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self._loss(batch)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            optimizer.step()
        return None

    def _loss(self, batch):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"], reduction="none")
        if self.poison.startswith("loss") and self.batches == self.at:
            here = batch["index"] == 16 * self.at + self.rank
            factor = loss if self.poison == "loss" else torch.ones(())
            loss = loss + torch.where(here, factor * float("nan"), torch.zeros(()))
        self.log("loss", loss.mean())
        return loss.mean()

    def on_after_backward(self):
        found = dict(self.named_parameters()).get(self.poison)
        if found is not None and self.batches == self.at and self.global_rank == self.rank:
            gradient: Any = found.grad
            part = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            part.view(-1)[0] = float("nan")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.batches += 1
        results: Any = outputs
        if self.automatic_optimization:
            self.losses.append(float(results["loss"]))

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.leave_out and self.batches == self.at:
            closure: Any = optimizer_closure
            closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self):
        if not self.automatic_optimization:
            body = [*self.stem.parameters(), *self.blocks.parameters()]
            return torch.optim.SGD(body, lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.05)
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Records(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def name(self):
        return "records"

    @property
    def version(self):
        return 0

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


def poisoned(layout: str | None, mode: str | None, module_options: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Trains until an error; what the ranks have then."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Plain(**module_options)
    strategy_options = {"on_nonfinite": mode} if mode else None
    trainer, replicas = trainer_for(layout, strategy_options=strategy_options, **options)
    records = _Records()
    trainer.loggers = [records]
    error = None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, DataLoader(Numbers(), batch_size=16 // replicas))
    except (NonFiniteError, RankFailed) as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "error": error,
        "losses": module.losses,
        "weights": weights(trainer, module),
        "skipped": [row["skipped_steps"] for row in records.rows if "skipped_steps" in row],
        "warned": [str(w.message) for w in caught if "not finite" in str(w.message)] if error is None else [],
        "steps": trainer.global_step,
    }


class Steady(Plain):
    """With an `eps` of the size of the gradients: an update changes no more than in proportion to rounding errors.

    In half precision, AdamW's squares of small gradients are zero; with a small `eps` such weights move by any amount.
    """

    def configure_optimizers(self):
        made: Any = super().configure_optimizers()
        made["optimizer"].param_groups[0]["eps"] = 0.01
        return made


def precise(
    layout: str | None,
    precision: str,
    module_options: dict[str, Any] | None = None,
    *,
    batch: int = 16,
    samples: int = 96,
    scale: float = 1024.0,
    save: str | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains in a precision; losses, weights and dtypes."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Steady(**(module_options or {}))
    kinds: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        kinds = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]}
    losses: list[float] = []
    gradients: set[str] = set()

    def after_backward(_: Any, root: L.LightningModule) -> None:
        gradients.update(str(p.grad.dtype) for p in root.parameters() if p.grad is not None)

    watch = LambdaCallback(
        on_after_backward=after_backward,
        on_train_batch_end=lambda trainer, *_: losses.append(float(trainer.callback_metrics["loss"])),
    )
    trainer, replicas = trainer_for(layout, callbacks=[watch], **kinds, **options)
    trainer.fit(module, DataLoader(Numbers(samples), batch_size=batch // replicas), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    whole = weights(trainer, module)
    state = [v for s in trainer.optimizers[0].state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return {
        "losses": losses,
        "weights": {name: value.double() for name, value in whole.items()},
        "dtypes": {str(value.dtype) for name, value in whole.items() if "accuracy" not in name},
        "gradients": gradients,
        "scale": scaler.get_scale() if (scaler := getattr(trainer.precision_plugin, "scaler", None)) else None,
        "optimizer": {str(v.dtype) for v in state if v.ndim},
    }
