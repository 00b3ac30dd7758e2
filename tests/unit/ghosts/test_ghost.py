"""Ghost tensors: no storage, the right shapes, errors instead of wrong numbers, and use of what was received."""

import pytest
import torch
from torch import nn

from lightning_hybrid.ghosts.ghost import Ghost, GhostReadError, GhostWriteError, ghost_like


def ghost(*shape: int) -> Ghost:
    return ghost_like(torch.empty(*shape))


def test_any_operation_on_a_ghost_gives_a_ghost_of_the_right_shape():
    out = torch.relu(ghost(2, 3) @ torch.ones(3, 5)).sum(1, keepdim=True)
    assert isinstance(out, Ghost)
    assert out.shape == (2, 1)
    assert out.device == torch.device("cpu")


def test_operations_on_real_tensors_stay_real():
    assert type(torch.ones(2) + 1) is torch.Tensor


def test_a_ghost_of_a_parameter_passes_for_a_parameter():
    stand_in = ghost_like(nn.Parameter(torch.zeros(3)))
    assert isinstance(stand_in, nn.Parameter)
    assert stand_in.requires_grad


def test_in_place_operations_return_the_same_ghost():
    value = ghost(3)
    assert value.add_(1) is value


@pytest.mark.parametrize("read", [lambda t: t.item(), bool, float, lambda t: t.tolist()])
def test_reading_a_value_names_the_users_line(read):
    with pytest.raises(GhostReadError, match=r"test_ghost\.py:\d+ .* reads the value"):
        read(ghost(1))


def test_writing_a_ghost_into_a_real_tensor_is_refused():
    target = torch.zeros(3)
    with pytest.raises(GhostWriteError, match="writes a value that is computed on another pipeline stage"):
        target[0] = ghost(3)[0]


def test_a_materialized_ghost_is_the_received_tensor_wherever_it_was_kept():
    value = ghost(2)
    kept = [value]
    received = torch.tensor([1.0, 2.0], requires_grad=True)
    value.materialize(received)
    (kept[0] * 3).sum().backward()
    assert received.grad is not None
    assert torch.equal(received.grad, torch.tensor([3.0, 3.0]))


def test_a_real_tensor_that_holds_a_ghost_is_copied_as_the_ghost():
    """As caches of transformers are, whose tensors a unit writes."""
    ghost = ghost_like(torch.zeros(3))
    assert torch.Tensor.__deepcopy__(ghost, {}) is ghost
