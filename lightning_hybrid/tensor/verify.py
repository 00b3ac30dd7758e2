"""Verifies a plan of one unit numerically: runs the unit as each rank would and compares with the whole.

For every rank the divided weights are replaced by their parts and the unit is called on plain tensors. The input of
each rowwise linear must be that rank's part of the recorded input, the input of every other linear and the unit's
result must be what they were, and the outputs of a rowwise linear must add up over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_hybrid.spec.tensor_plan import Path, ShardedParameter, UnitPlan
from lightning_hybrid.tensor.attributes import attribute_entries
from lightning_hybrid.tensor.numbers import Numbers, shadowed
from lightning_hybrid.tensor.probe import FORWARD_ERRORS, Trial, linear_dims
from lightning_hybrid.tensor.scopes import part_of
from lightning_hybrid.tensor.width import add_narrowing, widen

_TOLERANCE = 1e-4
"""Relative to the largest value of the tensor; another order of sums changes about 1e-6, a wrong part about 1."""


class Mismatch(Exception):
    """A rank computes wrong values; the message names the tensor."""


def verify(candidates: Iterable[UnitPlan], trial: Trial, ranks: int) -> UnitPlan:
    """Returns the first of `candidates` with which every rank computes correct values.

    Args:
        candidates: Plans of the unit.
        trial: The recorded run of the whole unit.
        ranks: Number of ranks.

    Raises:
        Mismatch: If no candidate is correct; the message is that of the first candidate.
    """
    first: Mismatch | None = None
    for candidate in candidates:
        try:
            total = {name: [torch.zeros_like(t) for t in trial.outputs[name]] for name in candidate.rowwise}
            for rank in range(ranks):
                _run_rank(candidate, trial, rank, ranks, total)
            for name, tensors in total.items():
                check_all(f"the sum of the outputs of `{name}`", tensors, trial.outputs[name])
        except Mismatch as error:
            first = first or error
        else:
            return candidate
    raise first or Mismatch("there was no candidate")


def _run_rank(plan: UnitPlan, trial: Trial, rank: int, ranks: int, total: dict[str, list[torch.Tensor]]) -> None:
    """Runs the unit as `rank`; adds the outputs of rowwise linears to `total`.

    Raises:
        Mismatch: If a value is wrong or the unit does not run.
    """
    numbers = trial.numbers

    def check_linear(name: str, call: int, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        expected = trial.inputs[name][call]
        if name in plan.rowwise:
            expected = expected.chunk(ranks, -1)[rank]
        check_values(f"the input of `{name}`", widen(given), expected)
        if name in plan.selected_outputs:
            return output.index_select(-1, torch.tensor(plan.selected_outputs[name][rank]))
        if name not in plan.rowwise:
            return None
        total[name][call] += output.detach()
        return trial.outputs[name][call].clone()

    entries = numbers.entries(*_local_weights(plan, numbers, rank, ranks))
    entries += attribute_entries(numbers.module, plan.attributes)
    linears = watched_linears(trial, check_linear, f"on rank {rank} than in the whole block")
    handles = list[RemovableHandle]()
    try:
        torch.default_generator.manual_seed(0)
        # With gradients, since some modules run other code without gradients in evaluation mode.
        with linears, shadowed(entries):
            for name, width in plan.widths.items():  # of what the checks have returned
                handles += add_narrowing(numbers.module.get_submodule(name), width, ranks)
            result = numbers.run(_local_arguments(plan, numbers, rank, ranks))
    except FORWARD_ERRORS as error:
        raise Mismatch(f"it does not run on a rank's part: {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    check_all("the result of the block", trial.consumed(result), trial.results)


@contextmanager
def watched_linears(
    trial: Trial, check: Callable[[str, int, torch.Tensor, torch.Tensor], torch.Tensor | None], when: str
) -> Iterator[None]:
    """Calls `check` after each linear of the unit that runs in the context.

    Args:
        trial: The recorded run of the whole unit.
        check: Gets the name, the number of earlier calls, the input and the output; what it returns is the output.
        when: Ends the message for a linear that is called more often than recorded.

    Raises:
        Mismatch: In the run, if a linear is called more often.
    """
    calls: dict[str, int] = {}
    names = {module: name for name, module in trial.numbers.module.named_modules()}

    def called(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        name = names[module]
        call = calls[name] = calls.get(name, -1) + 1
        if call >= len(trial.inputs[name]):
            raise Mismatch(f"`{name}` is called more often {when}")
        return check(name, call, args[0] if args else kwargs["input"], output)

    handles = [m.register_forward_hook(called, with_kwargs=True) for m in names if linear_dims(m) is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _local_weights(plan: UnitPlan, numbers: Numbers, rank: int, ranks: int) -> tuple[dict, dict]:
    def to_local(values: dict[str, torch.Tensor], divided: dict[str, ShardedParameter]) -> dict[str, torch.Tensor]:
        local = {n: part_of(v, divided[n], rank, ranks) if n in divided else v for n, v in values.items()}
        return {n: v.detach().requires_grad_() if v.dtype.is_floating_point else v for n, v in local.items()}

    parameters, buffers = to_local(numbers.parameters, plan.parameters), to_local(numbers.buffers, plan.buffers)
    for name in plan.rowwise:
        if f"{name}.bias" in parameters:
            parameters[f"{name}.bias"] = parameters[f"{name}.bias"].detach() / ranks
    return parameters, {n: v.detach() for n, v in buffers.items()}


def _local_arguments(plan: UnitPlan, numbers: Numbers, rank: int, ranks: int) -> dict[Path, torch.Tensor]:
    copies = {id(value): value.clone() for value in numbers.arguments.values()}  # a tensor passed twice stays one
    arguments = {path: copies[id(value)] for path, value in numbers.arguments.items()}
    for cut in plan.slices:
        value = arguments[cut.path]
        index = [i for i in range(value.shape[cut.dim]) if cut.owners[i % len(cut.owners)] == rank]
        arguments[cut.path] = value.index_select(cut.dim, torch.tensor(index))
    return arguments


def check_all(where: str, values: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Compares tensors with those of a recorded run.

    Raises:
        Mismatch: If their number, shapes or values differ.
    """
    if len(values) != len(expected):
        raise Mismatch(f"{where} has {len(values)} tensors instead of {len(expected)}")
    for value, correct in zip(values, expected, strict=True):
        check_values(where, value, correct)


def check_values(where: str, value: Any, expected: torch.Tensor) -> None:
    """Compares a tensor with that of a recorded run.

    Raises:
        Mismatch: If their shapes or values differ.
    """
    if value.shape != expected.shape:
        raise Mismatch(f"{where} has shape {tuple(value.shape)} instead of {tuple(expected.shape)}")
    value, expected = value.detach(), expected.detach()
    if not value.dtype.is_floating_point:
        if not torch.equal(value, expected):
            raise Mismatch(f"{where} differs")
        return
    finite = expected[torch.isfinite(expected)]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    if not torch.allclose(value, expected, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True):
        raise Mismatch(f"{where} differs")
