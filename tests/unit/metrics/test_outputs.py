"""Joining over microbatches what `training_step` returns, and over replicas the states of metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_mean

from lightning_hybrid.metrics.outputs import extras, join
from lightning_hybrid.metrics.torchmetrics import combine
from lightning_hybrid.spec.errors import PartitionError

SAMPLES = [2, 2]
CASES: dict[str, tuple[Any, Any, Any]] = {
    "rows": (torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([[1.0] * 3] * 2 + [[0.0] * 3] * 2)),
    "scalar tensors": (torch.tensor(1.0), torch.tensor(4.0), torch.tensor(2.5)),
    "whole-number tensors": (torch.tensor(1), torch.tensor(4), torch.tensor(2.5)),
    "numbers": (1, 4, 2.5),
    "texts a sample": (["a", "b"], ["c", "d"], ["a", "b", "c", "d"]),
    "equal texts": ("same", "same", "same"),
    "nothing": (None, None, None),
    "nested": ({"x": (1.0, 2.0)}, {"x": (3.0, 4.0)}, {"x": (2.0, 3.0)}),
    "equal tensors": (torch.ones(3), torch.ones(3), torch.ones(3)),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_joined(case: str) -> None:
    first, second, expected = CASES[case]
    joined = join([{"value": first}, {"value": second}], SAMPLES)["value"]
    if isinstance(expected, torch.Tensor):
        assert torch.equal(joined, expected)
    else:
        assert joined == expected


def test_numbers_are_weighted_by_samples() -> None:
    assert join([{"value": 1.0}, {"value": 4.0}], [1, 2]) == {"value": 3.0}


@pytest.mark.parametrize(
    "values",
    [
        ("a", "b"),
        (torch.zeros(3), torch.ones(3)),
        (True, False),
        ({"a": 1}, {"b": 1}),
        ((1, 2), (1,)),
        ([1.0], [1.0, 2.0, 3.0]),
        (torch.ones(2), None),
    ],
)
def test_outputs_that_can_not_be_joined_are_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(
        PartitionError, match=r"`training_step\['value'\]` is a .* differs between microbatches.*number"
    ):
        join([{"value": v} for v in values], SAMPLES)


def test_what_comes_with_the_loss_has_no_graph() -> None:
    logits = torch.ones(2, requires_grad=True) * 2
    returned = extras({"loss": logits.sum(), "logits": [logits]})
    assert list(returned) == ["logits"]
    assert not returned["logits"][0].requires_grad
    assert extras(logits.sum()) == {}


def test_states_are_joined_in_the_order_of_the_samples() -> None:
    batch_weights = [torch.tensor([0.0, 2.0, 4.0]), torch.tensor([1.0, 3.0])]
    assert combine(batch_weights, dim_zero_cat).tolist() == [0, 1, 2, 3, 4]
    assert combine([list(batch_weights[0].split(2)), list(batch_weights[1].split(1))], dim_zero_cat).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert combine([["a", "c"], ["b"]], None) == ["a", "b", "c"]


def test_states_of_replicas_that_did_not_take_turns_are_joined_as_they_are() -> None:
    assert combine([torch.tensor([5.0]), torch.tensor([1.0, 3.0])], dim_zero_cat).tolist() == [5, 1, 3]
    assert combine([[torch.tensor(5.0)], []], dim_zero_cat).tolist() == [5]
    assert combine([[], []], dim_zero_cat) == []
    assert combine([["a"], ["b", "c", "d"]], None) == ["a", "b", "c", "d"]


def test_other_states_are_stacked_and_reduced() -> None:
    states = [torch.tensor(1.0), torch.tensor(3.0)]
    assert combine(states, dim_zero_mean) == 2
    assert combine(states, None).tolist() == [1, 3]
