"""Finding fused experts in modules that are not named to the search, and those that look like them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_hybrid.experts.detect import candidates, plan_experts, recorded_calls
from lightning_hybrid.models.experts import Experts
from lightning_hybrid.spec import Layout, PartitionError


class Calls(nn.Module):
    """Calls what it is given with tokens, weights and experts, some of them by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> Any:
        index = torch.randint(len(next(self.inner.parameters())), (len(tokens), 2))
        return self.inner(tokens, index, weights_NA=torch.rand(len(tokens), 2))


def plan(module: nn.Module, *args: Any, ep: int = 2) -> Any:
    names = candidates(module)
    with recorded_calls(module, names) as calls:
        module(*args)
    return plan_experts(module, names, calls, Layout(ep=ep))


def test_arguments_are_found_by_shape_and_dtype() -> None:
    plans = plan(Calls(Experts(4, 16, 8)), torch.randn(6, 16))
    found = plans["inner"]
    assert (found.tokens, found.index, found.weights) == (("args", 0), ("args", 1), ("kwargs", "weights_NA"))
    assert (found.experts, found.attributes) == (4, ())
    assert list(found.part(1, 2)) == [2, 3]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_transformers(implementation: str) -> None:
    config = hf.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    config._experts_implementation = implementation
    plans = plan(hf.MixtralForCausalLM(config), torch.arange(5)[None])
    assert list(plans) == ["model.layers.0.mlp.experts"]
    assert plans["model.layers.0.mlp.experts"].attributes == ("num_experts",)


def test_convolutions_and_recurrent_weights_are_no_candidates() -> None:
    assert candidates(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.LSTM(4, 4), nn.Linear(4, 4))) == {}


class Stacked(nn.Module):
    """A stack of weights of another kind: called without chosen experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nd,hde->ne", x, self.weight)


def test_stacked_weights_that_are_no_experts_are_left_alone() -> None:
    assert list(candidates(nn.Sequential(Stacked()))) == ["0"]
    with pytest.raises(PartitionError, match=r"`ep=2`, but Sequential has no experts that can be divided"):
        plan(nn.Sequential(Stacked()), torch.randn(6, 16))


class WeighsTheInput(Experts):
    """Not linear in the weights: they are applied before the activation."""

    def forward(self, x_ND: torch.Tensor, index_NA: torch.Tensor, weights_NA: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(weights_NA[:, :1])
        each = [super(WeighsTheInput, self).forward(x_ND * w[:, None], i[:, None], ones)
                for w, i in zip(weights_NA.T, index_NA.T, strict=True)]  # fmt: skip
        return torch.stack(each).sum(0)


class Two(nn.Module):
    """Experts that can be divided, and such that can't."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = Calls(Experts(4, 16, 8)), Calls(WeighsTheInput(4, 16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bad(self.good(x))


def test_what_stays_whole_is_said() -> None:
    with pytest.warns(
        match=r"Some experts stay whole on every rank of `layout='ep2'`: `bad\.inner` does not return the weighted"
    ):
        assert list(plan(Two(), torch.randn(6, 16))) == ["good.inner"]


def test_what_gives_other_numbers_in_parts_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"`inner` does not return the weighted sum of the outputs of its experts"):
        plan(Calls(WeighsTheInput(4, 16, 8)), torch.randn(6, 16))
