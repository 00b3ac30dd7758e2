"""Checks that what a rank computes in a region does not depend on the channels of other ranks, whatever their size.

Gradients and a trial show what a unit computes near the numbers of the trial. A bound that these numbers do not reach,
such as `h * (30 / h.norm(dim=-1, keepdim=True)).clamp(max=1)` or `if h.abs().max() > 100:`, joins the channels of all
ranks only later, when training has started. Here the channels of other ranks get values far outside of any bound.
"""

from __future__ import annotations

import torch

from lightning_hybrid.spec.tensor_plan import UnitPlan
from lightning_hybrid.tensor.numbers import is_float, shadowed
from lightning_hybrid.tensor.probe import FORWARD_ERRORS, Trial
from lightning_hybrid.tensor.verify import check_all, check_values, watched_linears

_FAR = (1e6, -1e6)
"""Values of the channels of other ranks: beyond the bounds in models, with squares that float32 can add. Empirical."""


def check_independence(plan: UnitPlan, trial: Trial, ranks: int) -> None:
    """Checks a verified plan of a unit.

    Args:
        plan: The plan.
        trial: The recorded run of the whole unit.
        ranks: Number of ranks.

    Raises:
        Mismatch: If a rank's part of a region depends on the channels of other ranks.
    """
    for rank in sorted({0, ranks - 1}):
        for value in _FAR:
            _run(plan, trial, rank, ranks, value)


def _run(plan: UnitPlan, trial: Trial, rank: int, ranks: int, value: float) -> None:
    """Runs the whole unit with `value` in the channels of all ranks but `rank`.

    Raises:
        Mismatch: If the part of `rank`, or anything outside of the regions, is not as recorded.
    """
    numbers = trial.numbers

    def check_linear(name: str, call: int, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        expected = trial.inputs[name][call]
        if name in plan.rowwise:
            given, expected = (t.chunk(ranks, -1)[rank] for t in (given, expected))
        check_values(f"with large values in channels of other ranks, the input of `{name}`", given, expected)
        if name in plan.rowwise:
            return trial.outputs[name][call].clone()
        if name not in plan.colwise:
            return None
        own = torch.tensor(plan.parameters[f"{name}.weight"].part(rank, ranks))
        return torch.full_like(output, value).index_copy(-1, own, output.index_select(-1, own))

    linears = watched_linears(trial, check_linear, "if channels of other ranks have large values")
    arguments = {id(v): v.clone() for v in numbers.arguments.values()}  # a tensor passed twice stays one
    try:
        torch.default_generator.manual_seed(0)
        # With gradients, since some modules run other code without gradients in evaluation mode.
        weights = {n: v.detach().requires_grad_(is_float(v)) for n, v in numbers.parameters.items()}
        with linears, shadowed(numbers.entries(weights, numbers.buffers)):
            result = numbers.run({path: arguments[id(v)] for path, v in numbers.arguments.items()})
    except FORWARD_ERRORS:
        return  # a check of the user's code on the values
    where = "with large values in channels of other ranks, the result of the block"
    check_all(where, trial.consumed(result), trial.results)
