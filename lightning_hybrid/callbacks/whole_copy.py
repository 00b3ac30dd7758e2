"""A copy of the trained module with whole weights, for callbacks that generate with it."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng


def whole_copy(trainer: Trainer, pl_module: LightningModule) -> LightningModule | None:
    """Returns a module of the same class with the current weights on rank 0, in evaluation mode, and None elsewhere.

    It is built from the saved hyperparameters on the CPU. Collective: every rank must call it.
    """
    # collective under `HybridStrategy`; other strategies hold the full weights
    strategy: Any = trainer.strategy
    state = getattr(strategy, "full_state_dict", strategy.lightning_module_state_dict)()
    if not trainer.is_global_zero:
        return None
    names = inspect.signature(type(pl_module).__init__).parameters
    with isolate_rng():
        module = type(pl_module)(**{name: value for name, value in pl_module.hparams.items() if name in names})
    module.load_state_dict(state)
    return module.eval()
