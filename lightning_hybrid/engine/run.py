"""`Run`: objects of one call of `fit`, `validate`, `test` or `predict` that do not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision

from lightning_hybrid._lightning_private import evaluation_loops, sampler_injection
from lightning_hybrid.launch.preemption import Preemption
from lightning_hybrid.patching import ignored_warning, patched


@dataclass(frozen=True, kw_only=True)
class Run:
    """The trainer, this rank's device, options of the strategy that every step needs, and patches on the trainer."""

    trainer: pl.Trainer
    device: torch.device
    precision: Precision
    on_nonfinite: Literal["raise", "skip"]
    preemption: Preemption
    any_rank: Callable[[bool], bool]
    """Function that returns True if its argument is True on any rank. Collective."""
    patches: ExitStack = field(default_factory=ExitStack)
    """Stack of patches on the trainer, its loops and loggers; closed when the run ends, also after an error."""

    @property
    def module(self) -> pl.LightningModule:
        """The LightningModule of the trainer."""
        return self.trainer.lightning_module

    def start(self) -> None:
        """Applies the patches to the trainer that do not depend on the layout."""
        # a sharded module whose first forward pass ran in inference mode (sanity validation) cannot train afterwards
        for loop in evaluation_loops(self.trainer):
            self.patches.enter_context(patched(loop, inference_mode=False))
        self.patches.enter_context(sampler_injection(self.trainer, False))
        # values of a step are reduced over the replicas already, whatever `sync_dist` says
        self.patches.enter_context(ignored_warning(r".*It is recommended to use `self\.log\(.*sync_dist=True\)`.*"))
        if torch.distributed.get_world_size() > 1:
            self.patches.enter_context(self.preemption.installed(self.trainer))
