"""After a run, and after an exception in one, everything is as Lightning alone would have left it."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_hybrid import HybridStrategy
from lightning_hybrid.adapt.batch_size import DecisionRules
from lightning_hybrid.adapt.phases import Phase
from lightning_hybrid.callbacks.adaptive_batch_size import AdaptiveBatchSize
from lightning_hybrid.callbacks.load_rebalancing import LoadRebalancing
from lightning_hybrid.callbacks.monitor import HybridMonitor
from lightning_hybrid.callbacks.phase_schedule import PhaseSchedule
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.launch import monitor
from lightning_hybrid.launch.failures import RankFailed
from tests.distributed.engine.stays import stays
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import Classifier, Numbers, quiet
from tests.harness import RankGroup
from tests.pairwise import slow
from tests.snapshot import ABSENT, Snapshot, process_state

# ---- runs, on every rank


class Failure(Exception):
    """Raised by the user's code."""


class Fails(L.Callback):
    """Raises in one hook; of those that are called several times, in the second call."""

    def __init__(self, hook: str) -> None:
        self.hook = hook
        self.calls = 0
        self.raised = False

    def called(self, hook: str, module: Any = None) -> None:
        """`module`: whose step has been called; a dry run on ghosts does not count."""
        dry = module is not None and isinstance(module.stem.weight, Ghost) and isinstance(module.head.weight, Ghost)
        if hook == self.hook and not dry:
            self.calls += 1
            if self.calls == 2 or hook in ("setup", "on_fit_start"):
                self.raised = True
                raise Failure(hook)

    def setup(self, trainer, pl_module, stage):
        self.called("setup")

    def on_fit_start(self, trainer, pl_module):
        self.called("on_fit_start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.called("on_train_batch_start")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.called("on_before_optimizer_step")

    def on_validation_batch_end(self, *_: Any):
        self.called("on_validation_batch_end")


class User(Classifier):
    """Whose steps can raise, with a batch norm, a scheduler and a hook on a gradient."""

    def __init__(self, fails: Fails) -> None:
        super().__init__()
        self.fails = fails
        self.norm = nn.BatchNorm1d(16)
        self.stem.weight.register_hook(_same)

    def forward(self, x):
        return super().forward(self.norm(x))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-4)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2}}

    def training_step(self, batch, batch_idx):
        self.fails.called("training_step", self)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.fails.called("validation_step", self)
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.fails.called("test_step", self)
        return super().validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.fails.called("predict_step", self)
        return super().predict_step(batch, batch_idx)


class Experts(Mixture):
    """The same with blocks of experts."""

    def __init__(self, fails: Fails) -> None:
        super().__init__(adamw=True)
        self.fails = fails

    def training_step(self, batch, batch_idx):
        self.fails.called("training_step", self)
        return super().training_step(batch, batch_idx)


def _same(gradient: torch.Tensor) -> torch.Tensor:
    return gradient


class Thaws(BaseFinetuning):
    """The stem is trained from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.stem)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.stem, optimizer)


OURS: dict[str, Callable[[], L.Callback]] = {
    "batch size": lambda: AdaptiveBatchSize(rules=DecisionRules(every_n_steps=1)),
    "rebalancing": lambda: LoadRebalancing(),
    "phases": lambda: PhaseSchedule([Phase(batch_size=16), Phase(at_step=1, batch_size=32)]),
    "monitor": lambda: HybridMonitor(),
}


def callbacks_of(kind: str, layout: str | None) -> list[L.Callback]:
    """The callbacks of a run; Lightning's own has one that does nothing in the place of ours."""
    if kind in OURS:
        return [L.Callback() if layout is None else OURS[kind]()]
    lightning: dict[str, list[L.Callback]] = {
        "fine-tuning": [Thaws()],
        "swa": [StochasticWeightAveraging(0.01, 1)],
        "ema": [EMAWeightAveraging()],
    }
    return lightning.get(kind, [])


def trainer_with(layout: str | None, alone: bool, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """A trainer with the layout, or with what Lightning has: DDP, or one process where ranks have the same data."""
    return L.Trainer(
        accelerator="cpu",
        devices=1 if layout is None and alone else 2,
        strategy=HybridStrategy(layout) if layout is not None else "auto" if alone else "ddp",
        max_epochs=2,
        logger=[CSVLogger(folder / "csv"), TensorBoardLogger(folder / "tensorboard")],
        callbacks=callbacks,
        enable_progress_bar=False,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
    )


@contextlib.contextmanager
def fresh_process() -> Iterator[None]:
    """Warnings as in a new process, and no waiting for ranks that are to end."""
    with warnings.catch_warnings(), patch.object(monitor, "_AWAIT_REPORT_SECONDS", 0.05):
        warnings.resetwarnings()
        quiet()
        yield


def run(
    layout: str | None, alone: bool, verb: str, fails: str, kind: str, folder: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """All attributes of the user's and of Lightning's objects, before a run and after it."""
    L.seed_everything(7, verbose=False)
    sys.excepthook = sys.__excepthook__  # after an earlier run that has failed in this process
    folder = folder / f"{layout}-{verb}-{fails}-{kind}"
    fail = Fails(fails)
    callbacks = [fail, *callbacks_of(kind, layout)]
    checkpoint, summary = ModelCheckpoint(folder / "saved"), ModelSummary()
    module = Experts(fail) if kind == "experts" else User(fail)
    trainer: Any = trainer_with(layout, alone, folder, [*callbacks, checkpoint, summary])
    train, other = (DataLoader(Numbers(n), batch_size=16 if alone else 8, shuffle=n == 48) for n in (48, 32))

    def snapshot() -> Snapshot:
        strategy = trainer.strategy
        roots = {
            "module": module,
            "callbacks": callbacks,
            "checkpoint": checkpoint,
            "summary": summary,
            "loaders": [train, other],
            "trainer": trainer,
            "precision": strategy.precision_plugin,
            "accelerator": strategy.accelerator,
            "checkpoint_io": strategy.checkpoint_io,
            "environment": getattr(strategy, "cluster_environment", None),
            "optimizers": list(strategy.optimizers),
            "schedulers": list(strategy.lr_scheduler_configs),
            "process": process_state(),
        }
        return Snapshot(roots)

    before = snapshot()
    with contextlib.suppress(Failure, RankFailed) if fails else contextlib.nullcontext():
        if verb == "fit":
            trainer.fit(module, train, other)
        else:
            getattr(trainer, verb)(module, other)
    assert fail.raised == bool(fails), f"`{fails}` has not been called"
    for thread in [t for t in threading.enumerate() if t.name == "failure monitor"]:
        thread.join(5)  # after a failure it ends by itself, a little later
    first, last = (
        {path.replace(str(folder), "."): text.replace(str(folder), ".") for path, text in end.texts(before).items()}
        for end in (before, snapshot())
    )
    return first, last


@functools.cache
def after_lightning(*arguments: Any) -> dict[str, str]:
    """All attributes after a run of Lightning's own."""
    return run(None, *arguments)[1]


Leaks = dict[str, tuple[str, str, str]]
"""By path: an attribute before a run, after it, and after Lightning's own run."""


def leaks(layout: str, folder: str, *runs: tuple[str, str, str]) -> list[Leaks]:
    """What each of these runs has changed and left otherwise than Lightning does.

    Args:
        layout: The layout.
        folder: For loggers and checkpoints.
        *runs: The function of the Trainer, where the user's code raises, and the module or callback.
    """
    found, alone = [], layout in ("tp2", "pp2")
    for verb, fails, kind in runs:
        with fresh_process():
            place = str(dist.get_rank()) if alone and dist.is_initialized() else ""
            plain = after_lightning(alone, verb, fails, "" if kind in OURS else kind, Path(folder) / f"plain{place}")
            before, after = run(layout, alone, verb, fails, kind, Path(folder) / "ours")
        ends = {p: (before.get(p, ABSENT), after.get(p, ABSENT), plain.get(p, ABSENT)) for p in before | after}
        changed = {p: texts for p, texts in ends.items() if texts[0] != texts[1] != texts[2]}
        whole = {p for p, texts in changed.items() if ABSENT in texts[:2]}
        outer = {p: t for p, t in changed.items() if not any(p.startswith((f"{w}.", f"{w}[")) for w in whole)}
        found.append(
            {p: texts for p, texts in outer.items() if not stays(layout, p, texts[1], kind in OURS, bool(fails))}
        )
    return found


# ---- tests

VERBS = [("fit", "", ""), ("validate", "", ""), ("test", "", ""), ("predict", "", "")]
FAILURES = [("fit", "training_step", ""), ("fit", "setup", ""), ("validate", "validation_step", "")]
MORE_FAILURES = [
    *(("fit", hook, "") for hook in ("on_fit_start", "validation_step", "on_train_batch_start")),
    ("fit", "on_before_optimizer_step", ""),
    ("test", "test_step", ""),
    ("predict", "predict_step", ""),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For loggers and checkpoints; Lightning's own runs are made once for all layouts."""
    return str(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("layout", [slow("dp2"), slow("fsdp2"), slow("tp2"), "pp2"])
def test_ends(ranks2: RankGroup, folder: str, layout: str) -> None:
    check(ranks2.call(leaks, layout, folder, *VERBS), VERBS)


@pytest.mark.parametrize("layout", [slow("dp2"), "fsdp2", "tp2"])
def test_failures(ranks2: RankGroup, folder: str, layout: str) -> None:
    check(ranks2.call(leaks, layout, folder, *FAILURES), FAILURES)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "tp2"])
def test_failures_in_every_hook(ranks2: RankGroup, folder: str, layout: str) -> None:
    check(ranks2.call(leaks, layout, folder, *MORE_FAILURES), MORE_FAILURES)


def test_failures_between_steps_of_a_pipeline(ranks2: RankGroup, folder: str) -> None:
    """Inside a step one rank would wait for the other, and be ended."""
    runs = [("fit", hook, "") for hook in ("setup", "on_fit_start", "on_train_batch_start")]
    check(ranks2.call(leaks, "pp2", folder, *runs), runs)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("batch size", "dp2"),
        ("rebalancing", "dp2"),
        ("phases", "dp2"),
        ("fine-tuning", "dp2"),
        slow("experts", "ep2"),
        slow("batch size", "fsdp2"),
        slow("rebalancing", "fsdp2"),
        slow("monitor", "dp2"),
        slow("monitor", "fsdp2"),
        slow("fine-tuning", "fsdp2"),
        *(slow(kind, layout) for kind in ("swa", "ema") for layout in ("dp2", "fsdp2")),
    ],
)
def test_callbacks(ranks2: RankGroup, folder: str, kind: str, layout: str) -> None:
    runs = [("fit", "", kind), ("fit", "training_step", kind)]
    check(ranks2.call(leaks, layout, folder, *runs), runs)


def check(found: list[list[Leaks]], runs: list[tuple[str, str, str]]) -> None:
    """Shows what has leaked on any rank."""
    text = ""
    for rank, of_rank in enumerate(found):
        for (verb, fails, kind), leaked in zip(runs, of_rank, strict=True):
            for path, (before, after, plain) in leaked.items():
                text += f"\n{verb} {fails} {kind} rank {rank}: {path}"
                text += f"\n    before    {before}\n    after     {after}\n    Lightning {plain}"
    assert not text, text
