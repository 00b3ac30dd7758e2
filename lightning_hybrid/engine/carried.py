"""State that a step of a pipeline changes: after each step every rank of the pipeline has that of one process.

Every stage runs the user's step from its first line, up to where the next stage begins, without the units of other
stages. State inside a unit is changed by the stage of the unit. Of state elsewhere, the first stage that got as far as
the last change has the right value; state that a later stage changes is sent to all ranks, too.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid.collectives import share_object, to_local
from lightning_hybrid.ghosts.contract import StateChange, StatePlace, StepContract
from lightning_hybrid.ghosts.ghost import Ghost, GhostObserver
from lightning_hybrid.ghosts.objects import Copy, apply_difference, difference, map_leaves, replace_leaves
from lightning_hybrid.ghosts.state import ModuleState
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.spec.errors import PartitionError


class CarriedState:
    """Exchanges the state that a step changes between the ranks of a pipeline.

    Args:
        root: The LightningModule.
        mesh: The device mesh.
        device: This rank's device.
        ranks: The pipeline rank of each stage.
        units: Names of the units.
    """

    def __init__(
        self, root: nn.Module, mesh: Mesh, device: torch.device, ranks: Sequence[int], units: Sequence[str]
    ) -> None:
        inside = tuple(f"{unit}." for unit in units)
        self._in_units = {name for name, _ in root.named_modules() if f"{name}.".startswith(inside)}
        self._outside: dict[StatePlace, Copy] = {}
        self._state, self._group, self._device = ModuleState(root), mesh.group("pp"), device
        self._ranks, self._rank = ranks, mesh.rank("pp")
        self._several = ranks.count(self._rank) > 1
        self.contract = StepContract()
        """The contract of the step that runs, or has run last."""
        self._bounds: Sequence[int] = ()
        self._changes: tuple[StateChange, ...] = ()
        self._before: dict[StatePlace, Copy] = {}
        self._tensors: dict[StatePlace, Tensor] = {}
        self._found: dict[StatePlace, bytes | Tensor | None] = {}
        self._ran = False

    def begin(self, contract: StepContract, bounds: Sequence[int], parts: int) -> None:
        """Begins a step.

        Args:
            contract: The contract of the step.
            bounds: The first call of each stage, and the number of calls.
            parts: Number of microbatches.

        Raises:
            PartitionError: If several stages of this rank would write the same weight.
        """
        if contract.weights and self._several:
            name, where = contract.weights[0]
            raise PartitionError(
                f"`schedule` has several stages on each rank, and the step writes the weight `{name}` ({where}): each "
                "stage would do so. Use `schedule='1F1B'`, or write the weight in a hook, such as "
                "`on_train_batch_start`."
            )
        self.contract, self._bounds, self._ran = contract, bounds, False
        self._changes = contract.changes if parts == 1 else contract.carried
        self._before = {c.place: Copy(self._state.get(c.place)) for c in self._changes}
        self._tensors = {
            c.place: self._before[c.place].value.detach().clone() for c in self._changes if c.written and self._several
        }
        self._found = {}

    def _copies_outside(self) -> dict[StatePlace, Copy]:
        """Returns copies of the state outside of units, except for what the step is known to change."""
        known = self.contract.caches | {change.place for change in self.contract.changes}
        places = self._state.places(without=self._in_units)
        return {place: Copy(value) for place, value in places if place not in known}

    def _check_others(self) -> None:
        """Checks that a stage has changed no other state outside of units than in the dry run.

        Raises:
            PartitionError: If it has: other ranks may lack the change, and microbatches may have made it several times.
        """
        after, before = self._copies_outside(), self._outside
        changed = [p for p, c in after.items() if p not in before or not c.same_as(before[p])]
        changed += [p for p in before if p not in after]
        if changed:
            raise PartitionError(
                f"The step has changed `{changed[0]}`, which it did not in the dry run that the pipeline's stages were "
                "prepared with: other stages may not have got that far. Change it in a hook, such as "
                "`on_train_batch_start`, which runs on every rank, or use a layout without `pp`."
            )

    def begin_stage(self) -> None:
        """Gives a stage the state from before the step, if another stage of this rank has run.

        Tensors that units have written stay: the backward pass of the other stage may need them.
        """
        if self._ran and self._several:
            for change in self._changes:
                if not (change.in_unit and change.written):
                    self._restore(change)
        self._outside = self._copies_outside()

    def _restore(self, change: StateChange) -> None:
        place = change.place
        self._state.set(place, self._before[place].restore())
        if place in self._tensors:
            with torch.no_grad():
                self._before[place].value.copy_(self._tensors[place])

    def end_stage(self, stage: int) -> None:
        """Keeps what this stage has to send.

        Raises:
            PartitionError: If state has a value that this stage does not know, or cannot be sent, or if the step has
                changed other state than in the dry run.
        """
        self._check_others()  # here, since gradient hooks may count in the backward pass
        self._ran = True
        for change in self._changes:
            if self._source(change) == stage and self._is_sent(change):
                self._found[change.place] = self._found_at(change)

    def _found_at(self, change: StateChange) -> bytes | Tensor | None:
        place = change.place
        value = replace_leaves(lambda t: self._known(change, t), self._state.get(place))
        if self._state.get(place) is not value:
            self._state.set(place, value)
        if change.written:
            if value is not self._before[place].value:
                raise PartitionError(
                    f"{change} by an assignment now, and wrote into the tensor in the dry run.{_ADVICE}"
                )
            return to_local(value.detach()).clone() if self._several else to_local(value.detach())
        found = difference(self._before[place], value, _Sent)
        if found is None:
            return None
        try:
            return pickle.dumps(found)
        except Exception as error:
            raise PartitionError(
                f"{change}, and stages of other ranks need the value, but it cannot be sent: {error} Keep numbers, "
                f"tensors, lists and dictionaries instead.{_ADVICE}"
            ) from error

    def _known(self, change: StateChange, value: Tensor) -> Tensor:
        if not isinstance(value, Ghost):
            return value
        if value.received is None:
            raise PartitionError(
                f"{change} to a tensor of shape {tuple(value.shape)} that is computed on another pipeline stage, other "
                f"than in the dry run.{_ADVICE}"
            )
        return value.received

    def _source(self, change: StateChange) -> int:
        """Returns the first stage that has the state as at the end of the step."""
        return next(
            s for s in range(len(self._ranks)) if s == len(self._ranks) - 1 or self._bounds[s + 1] >= change.known
        )

    def _is_sent(self, change: StateChange) -> bool:
        """Returns True if not all stages have the state."""
        return change.in_unit or change.ghosts or self._source(change) > 0

    def end(self) -> None:
        """Gives all ranks the state of one process. Collective over the ranks of a pipeline."""
        for stage, rank in enumerate(self._ranks):
            due = [c for c in self._changes if self._source(c) == stage and self._is_sent(c)]
            self._send_tensors([c for c in due if c.written], rank)
            others = [c for c in due if not c.written]
            if not others:
                continue
            sent = share_object([self._found.get(c.place) for c in others], rank, self._group, self._device)
            for change, found in zip(others, sent, strict=True):
                if rank != self._rank or self._several:
                    self._take(change, found)
        if self.contract.overwritten and not any(c in self._changes for c in self.contract.overwritten):
            for change in self.contract.overwritten:
                instead = _OfOneMicrobatch(change, self._device).instead_of
                self._state.set(change.place, map_leaves(instead, change.form))
        self._changes, self._before, self._tensors, self._found = (), {}, {}, {}

    def _take(self, change: StateChange, found: bytes | None) -> None:
        before = self._before[change.place]
        value = before.restore()
        if found is not None:
            value = apply_difference(value, pickle.loads(found))  # noqa: S301 -- of another rank of this run
        self._state.set(change.place, value)

    def _send_tensors(self, changes: list[StateChange], rank: int) -> None:
        by_dtype: dict[torch.dtype, list[StateChange]] = defaultdict(list)
        for change in changes:
            by_dtype[self._before[change.place].value.dtype].append(change)
        for same in by_dtype.values():
            targets = [to_local(self._before[c.place].value.detach()) for c in same]
            values = [self._found.get(c.place, t) for c, t in zip(same, targets, strict=True)]
            together = torch.cat([v.to(self._device).reshape(-1) for v in values])  # type: ignore[union-attr]
            dist.broadcast(together, dist.get_global_rank(self._group, rank), group=self._group)
            with torch.no_grad():
                for target, new in zip(targets, together.split([t.numel() for t in targets]), strict=True):
                    target.copy_(new.view(target.shape))


_ADVICE = " Use a layout without `pp`, or change the state in every step alike."


class _Sent:
    """A tensor on its way to other ranks, where it is on the same kind of device."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Tensor, str]]:
        return _arrived, (self._tensor.cpu(), self._tensor.device.type)


def _arrived(tensor: Tensor, device: str) -> Tensor:
    return tensor.to(device)


class _OfOneMicrobatch(GhostObserver):
    """Refuses the use of state that has the value of one microbatch only, after the step."""

    def __init__(self, change: StateChange, device: torch.device) -> None:
        self._change, self._device = change, device

    def instead_of(self, tensor: Tensor) -> Ghost:
        """Returns a ghost in place of `tensor`."""
        return Ghost(torch.empty_like(tensor, device="meta"), self._device, self)

    def used(self, func: Any, ghosts: list[Ghost]) -> None:  # noqa: D102
        raise PartitionError(
            f"{self._change}, and has done so once for each microbatch, so that its value after the step is not that "
            "of the batch. Use `microbatches=1` to read it after a step."
        )

    def read(self, ghost: Ghost) -> Any:  # noqa: D102
        self.used(None, [ghost])
