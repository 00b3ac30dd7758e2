"""The user's objects after a run: they can be copied, saved, used by hand and given to another Trainer."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelSummary
from torch import nn
from torch.utils.data import DataLoader

from lightning_hybrid import PartitionError
from lightning_hybrid.adapt.phases import Phase
from lightning_hybrid.callbacks.phase_schedule import PhaseSchedule
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.launch import monitor
from lightning_hybrid.launch.failures import RankFailed
from lightning_hybrid.parallelize import whole
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights
from tests.harness import RankGroup
from tests.pairwise import quick, slow

LAYOUTS = ("dp2", "fsdp2", "tp2", "pp2")


class WithNorm(Classifier):
    """With a batch norm, whose statistics are those of all replicas while it is trained."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__(lazy=lazy)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return super().forward(self.norm(x))


def loader(replicas: int) -> DataLoader:
    return DataLoader(Numbers(), batch_size=16 // replicas)


def trained(layout: str, module: L.LightningModule, **options: Any) -> L.Trainer:
    """A trainer that has trained a module."""
    quiet()
    trainer, replicas = trainer_for(layout, **options)
    trainer.fit(module, loader(replicas))
    return trainer


# ---- copies and files


def copied(layout: str) -> dict[str, Any]:
    """A copy, a pickled one and the methods of a module after training."""
    L.seed_everything(7, verbose=False)
    module = WithNorm()
    with patch.object(whole, "SHARE_OF_FREE_MEMORY", 0.0):
        trainer = trained(layout, module)
    found: dict[str, Any] = {"own": [k for k in ("__deepcopy__", "load_state_dict") if k in vars(module)]}
    module.eval()
    x = torch.ones(2, 16)
    try:
        other: Any = copy.deepcopy(module)
        found |= {"class": type(other).__name__, "same": torch.equal(other(x), module(x))}
    except PartitionError as error:
        found["error"] = str(error)
    if layout == "dp2":
        module.trainer = None
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        found |= {"read": type(read).__name__, "read same": torch.equal(read(x), module(x))}
    del trainer
    return found


def test_a_copy_of_a_module_with_all_weights(ranks2: RankGroup) -> None:
    for found in ranks2.call(copied, "dp2"):
        assert found == {"own": [], "class": "WithNorm", "same": True, "read": "WithNorm", "read same": True}


@pytest.mark.parametrize("layout", quick(["fsdp2", "tp2", "pp2"], "pp2"))
def test_a_copy_of_parts_is_refused(ranks2: RankGroup, layout: str) -> None:
    for found in ranks2.call(copied, layout):
        assert f"by `layout='{layout}'`, and a copy needs all of them" in found.get("error", "")


def loaded(layout: str) -> tuple[str, bool, bool]:
    """Whole weights are given to a trained module: the error; whether the module has them, whether it is as before."""
    L.seed_everything(7, verbose=False)
    module = WithNorm()
    trainer = trained(layout, module)
    before = weights(trainer, module)
    new = {k: v + 1 for k, v in WithNorm().state_dict().items()}
    error = ""
    try:
        module.load_state_dict(new)
    except Exception as raised:
        error = type(raised).__name__
    after = weights(trainer, module)
    has, same = (all(torch.equal(after[k], x[k]) for k in after) for x in (new, before))
    return error, has, same


@pytest.mark.parametrize("layout", quick(LAYOUTS, "fsdp2", "pp2"))
def test_whole_weights_are_loaded_or_refused(ranks2: RankGroup, layout: str) -> None:
    error, new, same = ranks2.call(loaded, layout)[0]
    assert (same and not new) if error else new


# ---- by hand


def used_by_hand(layout: str) -> list[str]:
    """Rank 0 alone computes gradients of the trained module; the other rank is elsewhere."""
    module = WithNorm()
    trainer = trained(layout, module)
    if trainer.global_rank == 0:
        module.train()
        module(torch.randn(8, 16)).sum().backward()
    return [name for name, p in module.named_parameters() if p.grad is None]


def test_one_rank_can_use_the_module(ranks2: RankGroup) -> None:
    assert ranks2.call(used_by_hand, "dp2", timeout_seconds=15)[0] == []


# ---- what the user has set


def own_attributes(layout: str) -> list[str]:
    """Attributes that the user has set on the module and on a plugin, and that are lost after training."""
    module = WithNorm()
    quiet()
    trainer, replicas = trainer_for(layout)
    plugin: Any = trainer.precision_plugin
    set_on: list[tuple[Any, str]] = [(module, n) for n in ("log", "log_dict", "load_state_dict", "lr_scheduler_step")]
    set_on += [(plugin, n) for n in ("clip_grad_by_norm", "clip_grad_by_value", "_after_closure")]
    set_on += [(module.accuracy, "update"), (module.norm, "forward"), (module.head, "_compiled_call_impl")]
    kept = []
    for owner, name in set_on:
        original = getattr(owner, name) or owner._call_impl
        owner.__dict__[name] = _passing(original)
        kept.append(owner.__dict__[name])
    trainer.fit(module, loader(replicas))
    return [n for (owner, n), value in zip(set_on, kept, strict=True) if vars(owner).get(n) is not value]


def _passing(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs)


@pytest.mark.parametrize("layout", quick(["dp2", "pp2"], "pp2"))
def test_attributes_of_the_user_stay(ranks2: RankGroup, layout: str) -> None:
    for lost in ranks2.call(own_attributes, layout):
        assert not lost, ", ".join(lost)


# ---- callbacks


class Thaws(BaseFinetuning):
    """The stem is trained from the second epoch on."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.stem)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.stem, optimizer)
            if self.fails:
                raise KeyError("in the callback")


def used_again(layout: str) -> tuple[list[str], int, bool]:
    """One callback in a run under the layout, then in one of Lightning's own with another module."""
    thaws, summary = Thaws(), ModelSummary()
    trained(layout, Classifier(), callbacks=[thaws, summary], max_epochs=2)
    own = sorted({"on_train_epoch_start", "load_state_dict", "on_fit_start"} & {*vars(thaws), *vars(summary)})
    module = Classifier()
    trainer, _ = trainer_for(None, callbacks=[thaws, summary], max_epochs=2)
    trainer.fit(module, loader(1))
    groups = trainer.optimizers[0].param_groups
    return own, len(groups), all(any(p is q for g in groups for q in g["params"]) for p in module.stem.parameters())


@pytest.mark.parametrize("layout", quick(["dp2", "pp2"], "pp2"))
def test_callbacks_can_be_given_to_another_trainer(ranks2: RankGroup, layout: str) -> None:
    for found in ranks2.call(used_again, layout):
        assert found == ([], 1, True)  # as with a new callback: the optimizer has the stem already


def failed_callback(layout: str) -> list[int]:
    """Ghosts in the groups of an optimizer after an error in the user's callback."""
    module = Classifier()
    quiet()
    trainer, replicas = trainer_for(layout, callbacks=[Thaws(fails=True)], max_epochs=2)
    optimizers: list[Any] = []
    with patch.object(monitor, "_AWAIT_REPORT_SECONDS", 0.05), contextlib.suppress(KeyError, RankFailed):
        trainer.fit(module, loader(replicas))
    optimizers += trainer.optimizers
    return [sum(isinstance(p, Ghost) for p in g["params"]) for o in optimizers for g in o.param_groups]


def test_optimizers_after_an_error_in_a_callback(ranks2: RankGroup) -> None:
    for ghosts in ranks2.call(failed_callback, "pp2"):
        assert set(ghosts) == {0}


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise KeyError("in the callback")


def failed_schedule() -> tuple[int, Any, int]:
    """What a strategy keeps of a callback after a run that has failed."""
    quiet()
    phases = PhaseSchedule([Phase(batch_size=32)])
    trainer, replicas = trainer_for("dp2", callbacks=[phases, Fails()])
    with patch.object(monitor, "_AWAIT_REPORT_SECONDS", 0.05), contextlib.suppress(KeyError, RankFailed):
        trainer.fit(Classifier(), loader(replicas))
    strategy: Any = trainer.strategy
    return len(strategy.listeners), strategy.sequence_length, trainer.accumulate_grad_batches


def test_a_failed_run_releases_the_strategy(ranks2: RankGroup) -> None:
    for found in ranks2.call(failed_schedule):
        assert found == (0, None, 1)


# ---- a run that could not begin


def refused_first(lazy: bool, refused: bool) -> dict[str, torch.Tensor]:
    """Weights of a run, of a module whose first layout was refused."""
    L.seed_everything(7, verbose=False)
    quiet()
    module = WithNorm(lazy)
    if refused:
        trainer, _ = trainer_for("tp2", strategy_options={"tensor_plan": {"no.such.module": "rowwise"}})
        with patch.object(monitor, "_AWAIT_REPORT_SECONDS", 0.05), contextlib.suppress(ValueError, RankFailed):
            trainer.fit(module, loader(1))
        L.seed_everything(7, verbose=False)
        if not lazy:
            WithNorm()  # draws what the module has drawn
    trainer = trained("dp2", module)
    return weights(trainer, module)


@pytest.mark.parametrize("lazy", [slow(False), True], ids=["built", "configure_model"])
def test_a_refused_layout_leaves_the_module_whole(ranks2: RankGroup, lazy: bool) -> None:
    expected, found = (ranks2.call(refused_first, lazy, refused)[0] for refused in (False, True))
    assert expected.keys() == found.keys()
    if not lazy:
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, msg=name)


# ---- put together again


def whole_again(layout: str, memory: float) -> list[str]:
    """What is different about a module that was partitioned, trained and put together again."""
    module = WithNorm()
    before = _facts(module)
    with patch.object(whole, "SHARE_OF_FREE_MEMORY", memory):
        trained(layout, module)
    engine: Any = module.__dict__.pop("_hybrid_engine")
    shown = _facts(module)
    engine.remove()
    facts = [shown, _facts(module)] if memory else [_facts(module)]
    return [f"{k}: {before.get(k)} -> {a.get(k)}" for a in facts for k in {**before, **a} if before.get(k) != a.get(k)]


def _facts(module: nn.Module) -> dict[str, Any]:
    """By name: classes, attributes of every module, the order of its parameters, numbers of hooks."""
    facts: dict[str, Any] = {}
    for name, child in module.named_modules():
        facts[f"{name}: class"] = type(child)
        facts[f"{name}: order"] = list(child._parameters)
        for key, value in vars(child).items():
            facts[f"{name}.{key}"] = len(value) if key.endswith("_hooks") else "there"
    for name, parameter in module.named_parameters():
        facts[f"{name}: shape"] = type(parameter), tuple(parameter.shape), parameter.requires_grad
        facts[f"{name}: hooks"] = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
    return {k: v for k, v in facts.items() if k != "._trainer"}


@pytest.mark.parametrize(
    ("layout", "memory"),
    quick(itertools.product(LAYOUTS, [0.0, 0.25]), ("fsdp2", 0.0), ("pp2", 0.0), ("dp2", 0.25), ("tp2", 0.25)),
)
def test_a_module_that_is_whole_again(ranks2: RankGroup, layout: str, memory: float) -> None:
    for different in ranks2.call(whole_again, layout, memory):
        assert not different, "\n".join(different)
