"""What a plan knows of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.ghosts.units import find_units
from lightning_hybrid.parallelize.describe import describe, divided_attributes
from lightning_hybrid.spec.expert_plan import ExpertPlan
from lightning_hybrid.spec.model import ParameterSpec
from lightning_hybrid.spec.tensor_plan import TensorPlan, UnitPlan


class Attention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.project = heads, nn.Linear(8, 8)


def stack(heads: int = 4, activation: type[nn.Module] = nn.GELU) -> Any:
    inner = [nn.Sequential(Attention(heads), nn.Linear(8, 8), activation()) for _ in range(2)]
    root: Any = nn.Module()
    root.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    root.blocks = nn.Sequential(*map(Block, inner))
    root.head = inner[1][1]
    return root


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def spec(root: nn.Module) -> Any:
    return describe(root, find_units(root), Parameters(root))


def test_units_and_parameters_of_a_module() -> None:
    found = spec(stack())
    assert found.units["blocks.0"] == "Block, Sequential, Attention, 2 Linear, GELU"
    assert found.blocks == ("blocks.0", "blocks.1")
    assert found.parameters["scale"] == ParameterSpec(dtype="bfloat16", shape=())
    assert found.parameters["blocks.1.inner.1.weight"] == ParameterSpec(dtype="float32", shape=(8, 8))
    assert "head.weight" not in found.parameters, "a shared weight counts once"


def test_other_classes_are_a_difference_where_all_shapes_are_equal() -> None:
    assert spec(stack()).difference(spec(stack())) is None
    assert spec(stack()).difference(spec(stack(activation=nn.Softmax))) == (
        "unit `blocks.0`: Block, Sequential, Attention, 2 Linear, GELU in the plan, "
        "Block, Sequential, Attention, 2 Linear, Softmax in the model"
    )


def test_attributes_that_plans_divide() -> None:
    root = stack(heads=8)
    root.add_module("other", nn.MultiheadAttention(8, 2))
    unit = UnitPlan(attributes={"inner.0": {"heads": 4}, "inner.1": {"out_features": 4}})
    plan = TensorPlan(size=2, units={"blocks.0": unit}, attention=("other",))
    experts = ExpertPlan(experts=8, tokens=(), index=(), weights=(), attributes=("heads",))
    assert divided_attributes(root, plan, {"blocks.1.inner.0": experts}) == {
        "blocks.1.inner.0": {"heads": 8},
        "blocks.0.inner.0": {"heads": 8},
        "blocks.0.inner.1": {"out_features": 8},
        "other": {"num_heads": 2},
    }
