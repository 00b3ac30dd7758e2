"""Infers the tensor parallelism inside one unit: trials, proposals, proofs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from lightning_hybrid.spec.tensor_plan import UnitPlan
from lightning_hybrid.tensor.attributes import candidates
from lightning_hybrid.tensor.independence import check_independence
from lightning_hybrid.tensor.numbers import make_numbers, probing, shorter_sizes
from lightning_hybrid.tensor.probe import FORWARD_ERRORS, Probe, Trial, linear_dims, run_trial
from lightning_hybrid.tensor.regions import Constraints, Rejection, propose
from lightning_hybrid.tensor.verify import Mismatch, verify

_ENOUGH_ROWS = 64
"""A ReLU channel is dead for a row of the input with probability 1/2, hence for 64 rows with 1 in 10^19."""
_MAX_TRIALS = 16


@dataclass(frozen=True, kw_only=True)
class UnitFlow:
    """The inferred plan of one unit; names are relative to the unit."""

    plan: UnitPlan = field(default_factory=UnitPlan)
    called: tuple[str, ...] = ()
    """The linears of the unit whose forward ran, in order."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a linear does not close a region."""


def infer_unit(
    module: nn.Module, args: tuple, kwargs: dict, ranks: int, constraints: Constraints, forced: Callable[[str], bool]
) -> UnitFlow:
    """Finds and verifies the regions of one unit.

    Args:
        module: The unit; it is not changed.
        args: Positional arguments of a recorded call.
        kwargs: Keyword arguments of the call.
        ranks: Size of the `tp` axis.
        constraints: Restrictions of what is divided.
        forced: Returns True for a linear (by relative name) that is tried as rowwise before the others.
    """
    linears = [n for n, m in module.named_modules() if linear_dims(m) is not None]
    if len(linears) < 2:
        return UnitFlow(called=tuple(linears))
    with probing(module):
        try:
            trials = _trials(module, args, kwargs)
        except FORWARD_ERRORS as error:
            return UnitFlow(reasons={"": f"it could not be run on random numbers: {type(error).__name__}: {error}"})
        for trial in trials:
            trial.drop_results(constraints.unused_results)
        probe = Probe(trials)
        plan, reasons = UnitPlan(), {}
        for row in sorted(probe.linears, key=lambda name: not forced(name)):
            if row in plan.rowwise or row in plan.colwise:
                continue
            try:
                region = propose(row, probe, trials[0].numbers, ranks, constraints).plan(trials[0].numbers, ranks)
                joined = _joined(plan, region)
                verified = verify(candidates(joined, region, trials[0], ranks), trials[0], ranks)
                check_independence(verified, trials[0], ranks)
                plan = verified
            except (Rejection, Mismatch) as error:
                reasons[row] = str(error)
    divided = {*plan.rowwise, *plan.colwise}
    return UnitFlow(
        plan=plan,
        called=tuple(probe.linears),
        reasons={name: reason for name, reason in reasons.items() if name not in divided},
    )


def _trials(module: nn.Module, args: tuple, kwargs: dict) -> list[Trial]:
    """Runs at least two trials, and enough that no channel is dead in all of them."""
    choices = shorter_sizes(args, kwargs)
    for sizes in choices:
        try:
            trials = [run_trial(make_numbers(module, args, kwargs, seed=0, sizes=sizes))]
        except FORWARD_ERRORS:
            if sizes is choices[-1]:
                raise
            continue
        rows = min((t[0].numel() // max(t[0].shape[-1], 1) for t in trials[0].inputs.values()), default=1)
        count = min(max(2, -(-_ENOUGH_ROWS // max(rows, 1))), _MAX_TRIALS)
        weights = trials[0].numbers.parameters
        negated = {id(weight): -weight for weight in weights.values()}  # dead channels become alive
        signs = [weights, {name: negated[id(weight)] for name, weight in weights.items()}]
        return trials + [
            run_trial(make_numbers(module, args, kwargs, seed=seed, sizes=sizes, weights=signs[seed % 2]))
            for seed in range(1, count)
        ]
    return []


def _joined(plan: UnitPlan, region: UnitPlan) -> UnitPlan:
    """Adds `region` to `plan`.

    Raises:
        Rejection: If both divide the same weight differently.
    """
    in_both = {*plan.rowwise, *plan.colwise} & {*region.rowwise, *region.colwise}
    if in_both:
        raise Rejection(f"`{min(in_both)}` belongs to another region already")
    for name, sharded in region.parameters.items():
        if plan.parameters.get(name, sharded) != sharded or name in plan.partial:
            raise Rejection(f"`{name}` is divided differently by another region")
    clash = {n for n in region.partial if n in plan.parameters}
    whole, known_whole = ({*p.shared_outputs, *p.selected_outputs} for p in (region, plan))
    clash |= whole & {*plan.colwise} | known_whole & {*region.colwise} | whole & known_whole
    clash |= set(region.partial) & set(plan.partial)
    if clash:
        raise Rejection(f"`{min(clash)}` is used by another region already")
    return UnitPlan(
        colwise=plan.colwise + region.colwise,
        rowwise=plan.rowwise + region.rowwise,
        regions=plan.regions + region.regions,
        parameters={**plan.parameters, **region.parameters},
        buffers={**plan.buffers, **region.buffers},
        partial=plan.partial + region.partial,
        shared_outputs={**plan.shared_outputs, **region.shared_outputs},
        selected_outputs={**plan.selected_outputs, **region.selected_outputs},
        widths=plan.widths,
        attributes={**plan.attributes, **region.attributes},
        slices=tuple(dict.fromkeys(plan.slices + region.slices)),
        shared_arguments=tuple(dict.fromkeys(plan.shared_arguments + region.shared_arguments)),
    )
