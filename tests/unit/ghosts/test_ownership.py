"""Held parameters and ghosts under the user's names."""

from typing import Any

import torch
from torch import nn

from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.parameters import Parameters

CPU = torch.device("cpu")


def model() -> Any:
    module: Any = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    module[1].weight.requires_grad_(False)
    return module


def test_released_parameters_are_out_of_sight_and_computing_with_them_gives_ghosts():
    module = model()
    parameters = Parameters(module)
    parameters.release(["0.weight", "0.bias"], CPU)
    assert [n for n, _ in module.named_parameters()] == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert isinstance(module[0](torch.ones(1, 2)), Ghost)
    assert set(parameters.local()) == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_optimizers_see_all_names_in_the_original_order():
    module = model()
    names = [n for n, _ in module.named_parameters()]
    parameters = Parameters(module)
    parameters.release(["0.weight", "2.weight", "1.weight"], CPU)
    with parameters.all_visible() as ghosts:
        shown = dict(module.named_parameters())
        assert list(shown) == names
        assert {n for n, p in shown.items() if id(p) in ghosts} == {"0.weight", "2.weight", "1.weight"}
        assert shown["0.weight"].requires_grad
        assert not shown["1.weight"].requires_grad
        torch.optim.AdamW([{"params": [p]} for p in shown.values()])
    assert "0.weight" not in dict(module.named_parameters())


def test_a_shared_parameter_has_one_entry_and_all_its_places():
    module = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    module[1].weight = module[0].weight
    parameters = Parameters(module)
    assert parameters.names == ["0.weight"]
    assert [slot.name for slot in parameters.slots["0.weight"]] == ["0.weight", "1.weight"]
    parameters.release(["0.weight"], CPU)
    assert module[0].weight is module[1].weight


def test_putting_back():
    module = model()
    parameters, weight = Parameters(module), module[0].weight
    parameters.release(["0.weight"], CPU)
    parameters.put("0.weight", weight)
    assert module[0].weight is weight
    assert isinstance(module[0](torch.ones(1, 2)), torch.Tensor)
