"""The contract of a step: what it changes, where, whose it is; caches do not count; which cuts state forbids."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_hybrid.ghosts.dry_run import trace_step
from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.ghosts.units import CallInterceptor, find_units


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.mask: Any = None
        self.hidden: Any = None
        self.calls = 0

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(4)
        self.hidden = self.linear(x)
        self.calls += 1
        return self.norm(self.hidden * self.mask)


class Module(L.LightningModule):
    views = 1
    blocks: Any
    found: Any

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.losses: list[Any] = []
        self.middle: Any = None
        self.first: Any = None

    def training_step(self, batch, batch_idx):
        if self.first is None:
            self.first = batch.mean(0)
        loss = torch.zeros(())
        for _ in range(self.views):
            x = batch
            for block in self.blocks:
                x = block(x)
                self.middle = x if block is self.blocks[0] else self.middle
            loss = loss + x.square().mean()
        self.losses.append(loss.detach())
        return loss


def traced(module: L.LightningModule) -> Trace:
    interceptor = CallInterceptor(module, find_units(module))
    interceptor.install()
    try:
        batch = torch.arange(16.0).view(4, 4)
        return trace_step(module, interceptor, module.training_step, (batch, 0), device=torch.device("cpu"))
    finally:
        interceptor.remove()


def test_what_a_step_changes_and_where() -> None:
    module = Module()
    contract = traced(module).contract
    found = {str(c.place): c for c in contract.carried}
    assert set(found) == {
        *("losses", "middle", "first"),
        *(f"blocks.{i}.calls" for i in range(3)),
        *(f"blocks.{i}.norm.{n}" for i in range(3) for n in ("running_mean", "running_var", "num_batches_tracked")),
    }
    assert "test_contract.py" in found["losses"].where
    assert "(training_step)" in found["losses"].where
    assert "(forward)" in found["blocks.1.calls"].where
    assert (found["losses"].known, found["middle"].known, found["first"].known) == (3, 1, 0)
    assert found["losses"].ghosts
    assert not found["first"].ghosts
    assert found["blocks.1.calls"].in_unit
    statistics = found["blocks.1.norm.running_mean"]
    assert (statistics.in_unit, statistics.written, statistics.known) == (True, True, 2)
    assert "(forward)" in statistics.where
    assert not found["losses"].in_unit


def test_caches_and_state_that_is_computed_anew_are_not_carried() -> None:
    contract = traced(Module()).contract
    assert {str(p) for p in contract.caches} == {f"blocks.{i}.mask" for i in range(3)}
    assert {str(c.place) for c in contract.overwritten} == {f"blocks.{i}.hidden" for i in range(3)}


class Statistics(L.LightningModule):
    """Running statistics of functions, in the step itself and in a block that only counts instances."""

    mean: torch.Tensor
    var: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.InstanceNorm1d(4, track_running_stats=True)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def training_step(self, batch, batch_idx):
        x = nn.functional.batch_norm(self.first(batch), self.mean, self.var, training=self.training)
        return self.last(x[:, :, None].expand(-1, -1, 2)).square().mean()


def test_running_statistics_of_functions_are_seen() -> None:
    found = {str(c.place): (c.in_unit, c.known) for c in traced(Statistics()).contract.carried}
    assert found == {
        "mean": (False, 1),
        "var": (False, 1),
        "last.running_mean": (True, 2),
        "last.running_var": (True, 2),
    }
    assert not traced(Statistics().eval()).contract.carried


class Writes(Module):
    """The step moves one weight after another."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for p, q in zip(self.blocks[0].linear.parameters(), self.blocks[1].linear.parameters(), strict=True):
                q.data.mul_(0.5).add_(p, alpha=0.5)
        return super().training_step(batch, batch_idx)


def test_weights_that_a_step_writes() -> None:
    trace = traced(Writes())
    found = dict(trace.contract.weights)
    assert trace.followers == {f"blocks.1.linear.{n}": {f"blocks.0.linear.{n}"} for n in ("weight", "bias")}
    assert set(found) == {"blocks.1.linear.weight", "blocks.1.linear.bias"}
    assert all("test_contract.py" in where for where in found.values())
    assert not traced(Module()).contract.weights


def test_nothing_stays_changed() -> None:
    module = Module()
    traced(module)
    assert module.losses == []
    assert module.first is module.middle is None
    assert [b.calls for b in module.blocks] == [0, 0, 0]
    assert int(module.blocks[0].norm.num_batches_tracked) == 0


def test_a_module_with_state_that_is_called_twice_stays_on_one_stage() -> None:
    module = Module()
    module.views = 2
    refusals = [cut.refusal for cut in traced(module).cuts.values()]
    assert all("both before and after this point" in str(refusal) for refusal in refusals)
    module.eval()
    for block in module.blocks:
        block.forward = block.linear.forward
    assert not any("both before" in str(cut.refusal) for cut in traced(module).cuts.values())


@pytest.mark.parametrize("shared", [True, False])
def test_state_that_hooks_collect_from_modules_forbids_cuts(shared: bool) -> None:
    module = Module()
    module.found = {}
    if shared:
        for i, block in enumerate(module.blocks):
            block.register_forward_hook(lambda m, args, out, i=i: module.found.update({i: out}))
    refusals = [cut.refusal for cut in traced(module).cuts.values()]
    assert all(("later stages do not run" in str(r)) == shared for r in refusals)
