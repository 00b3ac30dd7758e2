"""Compares what a step does besides gradients: changes of state and weights, values that it returns and logs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from lightning_hybrid._torch_private import location_of
from lightning_hybrid.collectives import first_problem, gather_objects
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.loss_weights import place_of
from lightning_hybrid.ghosts.contract import StatePlace
from lightning_hybrid.parallelize.whole import Weights
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.verification.differences import of_written
from lightning_hybrid.verification.reported import unequal_logs, unequal_returned
from lightning_hybrid.verification.state import State, largest_difference
from lightning_hybrid.verification.steps import Outcome

_OF_LOGS = "Log a `torchmetrics.Metric`, or sums with `reduce_fx='sum'`."
_OF_RETURNED = "Hooks and callbacks see them: return tensors with a row for each sample, or leave them out."


class Unequal(NamedTuple):
    """How the values that a step reports differ from those of one process, on any rank."""

    returned: dict[str, str]
    """By place in what the step returns."""
    logged: dict[str, str]
    """By name."""

    def without(self, other: Unequal) -> Unequal:
        """Returns the differences at other places than those of `other`."""
        return Unequal(*({k: how[k] for k in how if k not in known} for how, known in zip(self, other, strict=True)))


class Effects:
    """Compares the effects of a step under the layout with those of one process on the same samples.

    Args:
        engine: The engine of the layout.
        bound: Bound of relative differences for the precision of the run.
    """

    def __init__(self, engine: Engine, bound: float) -> None:
        self._engine, self._layout, self._bound = engine, engine.plan.layout, bound

    def compare_state(self, under: Outcome, whole: Outcome) -> None:
        """Compares the state that the step has changed. Collective.

        Raises:
            PartitionError: On all ranks, if it differs on any.
        """
        shared = whole.state.keys() if under.shared is None else under.shared
        expected = {place: leaves for place, leaves in whole.state.items() if place in shared}
        self._refuse(*largest_difference(self._comparable(under.state), self._comparable(expected)))

    def _comparable(self, state: State) -> State:
        """Returns the state without that of divided experts: those of a rank see tokens of all ranks of `ep`."""
        experts = self._engine.partition.experts
        return state if experts is None else {p: leaves for p, leaves in state.items() if not experts.own(p.owner)}

    def compare_written(self, under: Outcome, whole: Outcome, weights: Weights) -> None:
        """Compares the weights that the step writes. Collective.

        Raises:
            PartitionError: On all ranks, if they differ on any.
        """
        partition, stage = self._engine.partition, self._engine.mesh.rank("pp")
        flags = [n in under.written or n in whole.written for n in partition.parameters.names]
        (written,) = on_any_rank(self._engine, flags)
        worst = 0.0, ""
        for name in (n for n in written if partition.plan.ranks_of(n)[0] == stage):
            present, before = partition.parameters[name].detach(), weights.values[name]
            found = partition.gathered(name, under.written.get(name, present))
            worst = max(worst, (of_written(found, whole.written.get(name, before), before), name))
        self._refuse(*worst)

    def _refuse(self, difference: float, place: StatePlace | str | None) -> None:
        """Refuses a difference of state or weights above the bound. Collective."""
        where = location_of(self._engine.root.training_step)
        text = (
            f"`layout='{self._layout}'`: the step ({where}) leaves `{place}` in another state than one process does on "
            f"the same samples: it differs by {difference:.2g} of its size. {when(self._engine)} Change it in a "
            "hook, such as `on_train_batch_start`, or use `verify='off'` if the difference is intended."
        )
        problem = first_problem(text if not difference <= self._bound else None)
        if problem is not None:
            raise PartitionError(problem)

    # ---- reported values

    def unequal(self, found: Outcome, expected: Outcome) -> Unequal:
        """Returns how the reported values differ, the same on all ranks. Collective."""
        compared = (found.reported, expected.reported, self._bound)
        own = unequal_returned(*compared), unequal_logs(*compared)
        merged: Unequal = Unequal({}, {})
        for returned, logged in gather_objects(own):
            merged = Unequal(returned | merged.returned, logged | merged.logged)
        return merged

    def message(self, does: str, how: dict[str, str], parts: int) -> str:
        """Returns the warning for values that differ under the layout.

        Args:
            does: `logs` or `returns`.
            how: How the values differ, by name.
            parts: The number of microbatches.
        """
        cause = " They are those of a microbatch, which `microbatches=1` avoids." if parts > 1 else ""
        return (
            f"`layout='{self._layout}'`: {place_of(self._engine.root)} {does} other values than one process does on "
            f"the same samples: {listed(how)}.{cause} {_OF_LOGS if does == 'logs' else _OF_RETURNED}"
        )

    def message_of_parts(self, how: dict[str, str]) -> str:
        """Returns the warning for logged values that another division of the samples changes, as among replicas."""
        return (
            f"{place_of(self._engine.root)} logs values that depend on how samples are divided: computed from equal "
            f"parts of the first batch, {listed(how)}. Under `layout='{self._layout}'` each replica "
            "computes them from its own samples, as under DistributedDataParallel, which differs from one process by "
            f"about as much. {_OF_LOGS}"
        )


def listed(how: dict[str, str]) -> str:
    """Returns the first differences of reported values as text."""
    each = [f"`{place}` {text}" for place, text in how.items()]
    return "; ".join(each[:3]) + (f"; and {len(each) - 3} more" if len(each) > 3 else "")


def on_any_rank(engine: Engine, *flags: list[bool]) -> list[list[str]]:
    """Returns the parameters whose flag is True on any rank, for each list of a flag per parameter. Collective."""
    values = torch.tensor(flags, dtype=torch.float32).to(engine.device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    names = engine.partition.parameters.names
    return [[n for n, has in zip(names, row, strict=True) if has] for row in values.tolist()]


def when(engine: Engine) -> str:
    """Returns a sentence that says at which time of the run a difference was found."""
    steps = engine.root.trainer.global_step
    return f"Steps before step {steps} had other kinds of values, or hooks." if steps else "Training has not started."
