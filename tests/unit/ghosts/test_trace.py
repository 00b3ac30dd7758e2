"""The dry run: what crosses at each cut, who uses which weight, what it costs; and that it leaves nothing behind."""

import lightning.pytorch as L
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_hybrid.ghosts.dry_run import trace_step
from lightning_hybrid.ghosts.free_code import FreeCall
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.ghosts.units import CallInterceptor, find_units

CPU = torch.device("cpu")


def trace(module: L.LightningModule, batch: torch.Tensor) -> Trace:
    interceptor = CallInterceptor(module, find_units(module))
    interceptor.install()
    try:
        return trace_step(module, interceptor, module.training_step, (batch, 0), device=CPU)
    finally:
        interceptor.remove()


class Stack(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.accuracy = torchmetrics.MeanMetric()
        self.steps = []

    def training_step(self, batch, batch_idx):
        x = first = self.embed(batch)
        for block in self.blocks:
            x = torch.tanh(block(x))
        x = x + first
        self.steps.append(batch_idx)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch.flatten())
        self.accuracy(loss)
        self.log("loss", loss)
        return loss


@pytest.fixture
def batch():
    return torch.arange(8).view(2, 4)


def test_the_values_that_later_stages_use_cross(batch):
    result = trace(Stack(), batch)
    assert [c.name for c in result.calls] == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert len(result.cuts[1].values) == 1, "the embedding's output is both input and skip connection"
    assert {v.source[0] for v in result.cuts[2].values} == {"arg", "out"}, "hidden state and skip connection"
    assert [v.shape for v in result.cuts[3].values] == [(2, 4, 8), (2, 4, 8)]
    assert len(result.cuts[4].values) == 1, "after the addition only the sum is left"


def test_shared_weights_have_one_name_and_all_their_uses(batch):
    result = trace(Stack(), batch)
    assert result.parameter_uses["embed.weight"] == (0, 4)
    assert result.parameter_uses["blocks.1.weight"] == (2,)


def test_flops_are_those_of_the_matrix_products(batch):
    result = trace(Stack(), batch)
    assert result.flops[1:] == [0, *[2 * 8 * 8 * 8] * 3, 2 * 8 * 8 * 11]


def test_nothing_is_left_behind(batch):
    module = Stack()
    before = {n: id(p) for n, p in module.named_parameters()}
    state = torch.get_rng_state()
    trace(module, batch)
    assert {n: id(p) for n, p in module.named_parameters()} == before
    assert module.steps == []
    assert module.accuracy.update_count == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert "log" not in module.__dict__


class ReadsValues(Stack):
    def training_step(self, batch, batch_idx):
        x = self.blocks[0](self.embed(batch))
        if x.mean() > 0:
            x = -x
        return self.head(self.blocks[1](x)).mean()


def test_reading_a_value_forbids_the_cuts_after_it(batch):
    result = trace(ReadsValues(), batch)
    assert result.cuts[1].refusal is None
    assert "test_trace.py" in str(result.cuts[2].refusal)
    assert "reads the value" in str(result.cuts[3].refusal)


class WritesIntoRealTensor(Stack):
    def training_step(self, batch, batch_idx):
        out = torch.zeros(2, 4, 8)
        out[:, 0] = self.embed(batch)[:, 0]
        return self.head(out).mean()


def test_a_tensor_of_the_step_that_units_write_crosses_like_their_results(batch):
    result = trace(WritesIntoRealTensor(), batch)
    (call,) = result.written
    assert (call.interval, call.function, call.number) == (-1, "zeros", 0)
    assert ("arg", 1, 0) in {value.source for value in result.cuts[1].values}


class WritesIntoAttribute(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(2, 4, 8)

    def training_step(self, batch, batch_idx):
        self.kept[:, 0] = self.embed(batch)[:, 0]
        return self.head(self.kept).mean()


def test_a_tensor_from_before_the_step_that_is_written_and_used_later_forbids_the_cuts_between(batch):
    result = trace(WritesIntoAttribute(), batch)
    assert [c.name for c in result.calls] == ["embed", "head"]
    assert "test_trace.py" in str(result.cuts[1].refusal)
    assert "has written with a value of an earlier stage" in str(result.cuts[1].refusal)
    assert isinstance(result.calls[1].args[0], Ghost), "it depends on parameters from then on"


class FreeCode(Stack):
    def training_step(self, batch, batch_idx):
        x = self.embed(batch)
        late = x.exp()
        return (self.head(self.blocks[0](x)) * late.sum()).mean()


def test_a_value_that_no_module_has_seen_is_named_by_the_call_that_made_it(batch):
    sources = {value.source for value in trace(FreeCode(), batch).cuts[1].values}
    assert ("free", FreeCall(0, "exp", 0), 0) in sources


class WritesView(Stack):
    def training_step(self, batch, batch_idx):
        x = self.embed(batch)
        first = x[:, 0]
        y = self.blocks[0](x * 1)
        first += 1
        return (self.head(y) * x.sum() * first.sum()).mean()


def test_views_of_a_tensor_that_is_written_later_cannot_cross_together(batch):
    assert "another view" in str(trace(WritesView(), batch).cuts[1].refusal)


class Tells(nn.Module):
    """Returns a number, or leaves one in an attribute."""

    def __init__(self, door: str) -> None:
        super().__init__()
        self.door, self.told = door, 0.0

    def forward(self, x):
        if self.door == "attribute":
            self.told = 1.0
        if self.door == "argument":
            x, found = x
            found.append(1.0)
        return (x * 1, 2.0) if self.door == "result" else (x * 1, None)


class ToldTo(Stack):
    def __init__(self, door: str) -> None:
        super().__init__()
        self.tells = Tells(door)

    def training_step(self, batch, batch_idx):
        x = self.embed(batch)
        x, _ = self.tells((x, []) if self.tells.door == "argument" else x)
        return self.head(self.blocks[0](x)).mean()


@pytest.mark.parametrize("door", ["result", "attribute", "argument", "none"])
def test_a_module_that_tells_numbers_is_run_by_later_stages(batch, door):
    call = next(call for call in trace(ToldTo(door), batch).calls if call.name == "tells")
    assert call.skippable == (door == "none")


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        choice = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for i in choice.unique():
            out[choice == i] = self.experts[i](x[choice == i])
        return out


class Routed(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Router() for _ in range(2))

    def training_step(self, batch, batch_idx):
        x = self.embed(batch)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).mean()


def test_a_block_with_control_flow_of_its_own_is_run_on_random_values(batch):
    result = trace(Routed(), batch)
    assert [c.concrete for c in result.calls] == [False, True, True, False]
    assert all(cut.refusal is None for cut in result.cuts.values())
    assert {"blocks.0.gate.weight", "blocks.0.experts.1.weight"} <= set(result.parameter_uses)
