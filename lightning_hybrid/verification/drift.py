"""Finds state that each replica computes from its own samples, and that steps compute with.

One process has one value for all samples. Attributes, and buffers that are not saved, are what users keep such values
in: a moving average of the loss, centers of classes, a queue of outputs. State that only hooks or logs read does not
matter, nor do values of single samples, such as hidden states that follow the rows of the batch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid._lightning_private import begins_window
from lightning_hybrid._torch_private import user_lines_seen
from lightning_hybrid.batches import count_samples, split_batch
from lightning_hybrid.collectives import gather_objects, share_object, to_local
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.ghosts.contract import StatePlace
from lightning_hybrid.ghosts.objects import Copy, map_leaves
from lightning_hybrid.ghosts.state import MISSING, ModuleState
from lightning_hybrid.parallelize.whole import Weights
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.verification.differences import differences, relative
from lightning_hybrid.verification.state import differing, leaves_of
from lightning_hybrid.verification.steps import Conditions, Outcome, run_in_one_process, run_under_layout
from lightning_hybrid.verification.whole import memory_problem

_SETTLED = 16
"""Update from which on state without effect on a step is not looked at again; by then it may have grown large."""
_SAME_ORDER = 0.01
"""Part of the bound for steps that compute in another order that holds for those that do it in the same; empirical."""


@dataclass(frozen=True)
class _Found:
    """State that differs on another replica."""

    place: StatePlace
    pooled: bool
    """True if all that differs are tensors with dimensions in containers."""
    rows: bool
    """True if all that differs may have a row per sample of the batch."""


@dataclass(frozen=True)
class _Influence:
    """The effect of the state of another replica on a step."""

    any: bool
    """True if any loss or gradient changes, on any rank."""
    large: bool
    """True if it changes by more than the bound."""
    own: float
    """This rank's loss with its own state."""
    other: float
    """This rank's loss with the state of the first replica."""


class ReplicaState:
    """Compares the state of replicas after the first, second, fourth, eighth ... update.

    Args:
        engine: The engine of the layout, before its first step.
        strict: True to refuse pools of samples, too, instead of a warning.
        bound: Largest relative difference of equal steps.
    """

    def __init__(self, engine: Engine, *, strict: bool, bound: float) -> None:
        self._engine, self._strict = engine, strict
        self._bound = bound * _SAME_ORDER
        self._state = ModuleState(engine.runner.root)
        self._before = self._state.copies()
        for copy in self._before.values():
            copy.release_items()  # they would add up over the run
        self._judged: set[StatePlace] = set()
        self._updates = -1

    def before_step(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compares the replicas, if it is time. Collective over all ranks.

        Args:
            args: Arguments of the `training_step` that is about to run.
            kwargs: Keyword arguments of `training_step`.

        Raises:
            PartitionError: On all ranks, if the step computes with values that are not those of one process.
        """
        if not begins_window(self._engine.runner.root.trainer):
            return
        self._updates += 1
        if not self._updates or self._updates & (self._updates - 1):
            return
        found = self._differing(count_samples(args[0]))
        if self._engine.run.world.any_rank(bool(found)):
            with self._engine.run.told("verify", "Comparing the state of the replicas"):
                self._judge(found, args, kwargs)

    def _differing(self, samples: int) -> list[_Found]:
        """Returns what differs between replicas. Collective over the ranks with the same part of the model."""
        changed = set(self._state.changed(self._before)) - self._judged
        group = self._engine.mesh.replica_group
        names = sorted(set().union(*gather_objects(changed, group)))
        replicas = gather_objects([leaves_of(self._state.get(place)) for place in names], group)
        found = []
        for place, *own in zip(names, *replicas, strict=True):
            unequal = differing([leaves for leaves in own if leaves is not None])
            if unequal:
                rows = all(samples in leaf.shape[: 2 if len(leaf.shape) > 2 else 1] for leaf in unequal)
                found.append(_Found(place, all(leaf.pooled for leaf in unequal), rows))
        return found

    def _judge(self, found: Sequence[_Found], args: tuple, kwargs: dict[str, Any]) -> None:
        """Runs the step with the state of this replica and with that of the first one. Collective."""
        others = self._of_first_replica(found)
        where: dict[StatePlace, str] = {}
        with self._lines(others, where):
            own = self._run(args, kwargs)
        influence = self._influence(own, others, args, kwargs)
        if not influence.any and self._updates >= _SETTLED:
            self._judged |= {f.place for f in found}
        if not influence.large:
            return  # it may grow
        single = {f: self._influence(own, {f.place: others[f.place]}, args, kwargs) for f in found}
        guilty = [f for f in found if single[f].large] or list(found)
        if all(f.rows for f in guilty) and self._follow_rows(guilty, args, kwargs):
            return  # unless it grows, as a pool of earlier samples that has those of one batch so far
        message = self._reported(guilty[0].place, influence, where)
        if self._strict or not all(f.pooled for f in guilty):
            raise PartitionError(message)
        self._judged |= {f.place for f in found}
        rank_zero_warn(message)

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        return run_under_layout(self._engine.runner, args, kwargs, Conditions())

    def _of_first_replica(self, found: Sequence[_Found]) -> dict[StatePlace, Any]:
        """Returns what the first replica has; this replica's own where that cannot be sent. Collective."""
        sent: dict[StatePlace, Any] = {}
        for place in (f.place for f in found):
            value = map_leaves(lambda t: to_local(t.detach()).cpu(), self._state.get(place))
            try:
                pickle.dumps(value)
            except Exception:  # noqa: BLE001 -- of any class of the user
                continue
            sent[place] = value
        mesh = self._engine.mesh
        others = share_object(sent, 0, mesh.replica_group, self._engine.device)
        return {f.place: others.get(f.place, self._state.get(f.place)) for f in found}

    def _influence(
        self, own: Outcome, others: dict[StatePlace, Any], args: tuple, kwargs: dict[str, Any]
    ) -> _Influence:
        """Returns how the step differs with other state. Collective."""
        with self._state.holding(others):
            other = self._run(args, kwargs)
        a, b = (0.0 if o.loss is None else float(o.loss) for o in (own, other))
        values = [relative(b, a), *differences(other.gradients, own.gradients, own.gradients).values()]
        worst = torch.tensor(values, dtype=torch.float64).nan_to_num(nan=torch.inf).max().to(self._engine.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return _Influence(any=bool(worst > 0), large=bool(worst > self._bound), own=a, other=b)

    def _follow_rows(self, found: Sequence[_Found], args: tuple, kwargs: dict[str, Any]) -> bool:
        """Returns True unless a step on half of the batch leaves state of the same shapes. Collective."""
        runner, partition = self._engine.runner, self._engine.partition
        if memory_problem(self._engine) is not None:
            return True
        weights, shapes = Weights.gather(partition), []
        # rows of the whole batch would not fit
        first = {f.place: self._before[f.place].value if f.place in self._before else MISSING for f in found}
        with self._state.holding(first):
            try:
                half = split_batch(args[0], 2, runner.known_samples())[0]
                for batch in (args[0], half):
                    out = run_in_one_process(runner, weights, [(batch, *args[1:])], kwargs, Conditions())
                    shapes.append([[leaf.shape for leaf in out.state.get(f.place) or ()] for f in found])
            except Exception:  # noqa: BLE001 -- of the user's step
                shapes.clear()
        same = len(shapes) == 2 and shapes[0] == shapes[1]
        return not self._engine.run.world.any_rank(same)

    @contextmanager
    def _lines(self, places: dict[StatePlace, Any], where: dict[StatePlace, str]) -> Iterator[None]:
        """Notes in `where` the line of the step that changes each of `places` first."""
        before = {place: Copy(self._state.get(place)) for place in places}
        last = ""

        def seen(line: str) -> None:
            nonlocal last
            for place, copy in before.items():
                if place not in where and last and not copy.same_as(Copy(self._state.get(place))):
                    where[place] = last
            last = line

        with user_lines_seen(seen):
            yield

    def _reported(self, place: StatePlace, influence: _Influence, where: dict[StatePlace, str]) -> str:
        """Returns the message of a rank that has the loss and the line, on all ranks. Collective."""
        layout = self._engine.plan.layout
        message = (
            f"`layout='{layout}'`: {where.get(place, 'a hook')} computes `{place}` from the samples of a replica, and "
            f"the step uses it: the loss is {influence.own:.6g} on a replica, {influence.other:.6g} with the value of "
            "the first replica. One process has one value for all samples. Compute it from `self.all_gather(...)` of "
            "the samples of all replicas, or use a layout of `tp` and `pp`."
        )
        messages = gather_objects((influence.own != influence.other, place in where, message))
        return max(messages, key=lambda found: found[:2])[2]
