"""A weight stays whole if a rank's part of the channels would show: to bounds on all channels, hooks, attributes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_hybrid.ghosts.record import UnitCall
from lightning_hybrid.spec.tensor_plan import TensorPlan
from lightning_hybrid.tensor.infer import infer_tensor_plan
from lightning_hybrid.tensor.regions import Constraints
from lightning_hybrid.tensor.unit import infer_unit

WIDTH = 16


class Bounded(nn.Module):
    """Two linears with a function of all channels between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), between

    def forward(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        hidden = self.between(self.up(x))
        if kept is not None:
            kept.append(hidden)
        return x + self.down(hidden)


class Keeps(Bounded):
    """Leaves its hidden values in an attribute."""

    def forward(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        self.hidden = self.between(self.up(x))
        return x + self.down(self.hidden)


class Caches(Bounded):
    """Leaves a value in an attribute that does not depend on the divided channels, in the first call only."""

    factor: Tensor | None = None

    def forward(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        if self.factor is None:
            self.factor = torch.full((1,), 0.5)
        return x + self.down(self.between(self.up(x)) * self.factor)


def plan(block: nn.Module, *others: object) -> TensorPlan:
    root = nn.Module()
    root.blocks = nn.ModuleList([block])
    call = UnitCall(name="blocks.0", args=(torch.randn(4, WIDTH, requires_grad=True), *others))
    return infer_tensor_plan(root, [call], 2)


def is_divided(block: nn.Module, *others: object) -> bool:
    return plan(block, *others).units["blocks.0"].rowwise == ("down",)


BOUNDS = {
    "norm": lambda h: h * (30 / (h.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1),
    "mean": lambda h: h * (h.abs().mean(-1, keepdim=True) < 50),
    "branch": lambda h: h if h.abs().max() < 100 else h / 10,
    "negative": lambda h: h if float(h.detach().mean()) > -100 else -h,
    "sum": lambda h: h / (1 + torch.relu(h.sum(-1, keepdim=True) - 40)),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_bound_on_all_channels_that_random_numbers_do_not_reach(bound: str) -> None:
    x = torch.randn(4, WIDTH, requires_grad=True)
    found = infer_unit(Bounded(BOUNDS[bound]), (x,), {}, 2, Constraints(), lambda name: False)
    assert not found.plan.rowwise
    assert "with large values in channels of other ranks" in found.reasons["down"]


@pytest.mark.parametrize(
    "between", [torch.relu, lambda h: h.clamp(-6, 6), lambda h: h.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)]
)
def test_bounds_on_single_channels_and_heads(between: Callable[[Tensor], Tensor]) -> None:
    assert is_divided(Bounded(between))


@pytest.mark.parametrize(("name", "divided"), [("", True), ("up", False), ("down", False)])
def test_hooks_of_the_user_see_whole_values(name: str, divided: bool) -> None:
    block = Bounded(torch.tanh)
    block.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    assert is_divided(block) == divided


def test_values_in_attributes_and_lists_are_whole() -> None:
    assert not is_divided(Keeps(torch.tanh))
    assert not is_divided(Bounded(torch.tanh), [])
    assert is_divided(Caches(torch.tanh))
