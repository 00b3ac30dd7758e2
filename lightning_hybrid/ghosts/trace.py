"""The dry run: runs the user's step once on ghost parameters, and records its data flow and its cost.

Time is counted in unit calls: **interval** k is the time from the entry of unit call k to the entry of unit call k + 1;
interval -1 is the time before the first call. Cutting at call c puts the intervals before c on one stage and the rest
on the next; every value computed before c and consumed at or after c crosses the cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_hybrid._torch_private import (
    WATCHING,
    flatten_fields,
    flops_of,
    is_mutable,
    is_plain,
    own_parameters,
    read_site,
    storage_key,
    tree_flatten,
    tree_map,
    tree_unflatten,
    user_location,
)
from lightning_hybrid.ghosts.attributes import Attributes
from lightning_hybrid.ghosts.contract import StepContract
from lightning_hybrid.ghosts.cuts import Source, Value, ValueFlow, find_cuts
from lightning_hybrid.ghosts.free_code import FreeCall, FreeCalls, WrittenByUnits
from lightning_hybrid.ghosts.ghost import Ghost, GhostObserver, ghost_like, is_differentiable
from lightning_hybrid.ghosts.hook_use import HookUse
from lightning_hybrid.ghosts.learn import Learned, Repeated, Timeline
from lightning_hybrid.ghosts.reads import Reads, Summary
from lightning_hybrid.ghosts.real import RealTensors
from lightning_hybrid.ghosts.record import Trace, UnitCall, shapes_of
from lightning_hybrid.ghosts.side_effects import SideEffects, modules_outside
from lightning_hybrid.ghosts.written import Statistic, WrittenTensors

_DATA_DEPENDENT = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError)


class Tracer(GhostObserver):
    """Records one step; see `trace_step`.

    Args:
        root: The module.
        units: Names of its units.
        reads: What reads of values return.
        written: Calls outside units that create tensors into which units write.
    """

    def __init__(self, root: nn.Module, units: Collection[str], reads: Reads, written: frozenset[FreeCall]) -> None:
        self.root, self.reads, self.summary = root, reads, Summary()
        self.real = RealTensors(root, self._ghost_of, self._depends_on_values)
        self.calls: list[UnitCall] = []
        self.values: dict[int, Value] = {}
        self.names: dict[int, Source] = {}
        self.arg_leaves: list[dict[int, int]] = []
        self.parameters: dict[int, str] = {}
        self.uses: dict[str, set[int]] = defaultdict(set)
        self.flops: dict[int, float] = defaultdict(float)
        self.reads_at: list[tuple[int, str]] = []
        """The intervals of reads outside units, and their places in the code."""
        self.ghosts: list[Ghost] = []
        """The ghosts of parameters, kept alive so that their ids stay unique."""
        self._storages: dict[int, str] = {}
        """The names of parameters, by storage."""
        self.weight_writes: dict[str, str] = {}
        """The line that writes each weight which the step writes, by name."""
        self._earlier = 0
        """Number of calls of an earlier step of this dry run."""
        self.free = FreeCalls(lambda: self.interval - self._earlier, self._name_results)
        self.fresh: dict[int, tuple[FreeCall | None, torch.Tensor]] = {}
        """By storage: the call outside units that has created a real tensor; None for tensors from before the step."""
        self.to_ghosts = written
        self._outside = modules_outside(root, units)
        self.inside = self.takes_gradients = self.depends_on_values = False
        self.concrete = self.answering = False
        """How the present unit runs again, since it reads values; see `_run_unit`."""
        self.written_tensors = WrittenTensors(lambda: self.interval, lambda: self.inside)
        self.repeated: Repeated | None = None
        """What an earlier step of this dry run has left; None in the first step."""
        self.timeline: Timeline | None = None
        self.hooks = HookUse(self.parameters)
        self.lists_parameters = False
        """True if code outside of units asks for the parameters of a module."""
        self.learned: Learned | None = None

    @property
    def interval(self) -> int:
        """Returns the current interval."""
        return len(self.calls) - 1

    # ---- GhostObserver

    # Described in `GhostObserver` and `CallHandler`.

    def used(self, func: Any, ghosts: list[Ghost]) -> None:  # noqa: D102
        written = is_mutable(func)
        targets = self._weights_of(func, ghosts) if written else set()
        if self.hooks.running or not self.inside:
            self.hooks.used(ghosts, targets)
        if self.hooks.running:
            return
        for ghost in ghosts:
            self.consume(ghost)
            if written and ghost.uid in self.values and ghost is ghosts[0]:
                self.values[ghost.uid].last_write = self.interval
        for name in targets:
            self.weight_writes.setdefault(name, user_location())

    def made(self, func: Any, args: tuple, kwargs: dict, out: Any, ghosts: list[Ghost]) -> None:  # noqa: D102
        if self.hooks.running or not self.inside:
            self.hooks.made(ghosts)
        if self.hooks.running:
            return
        location = "" if self.inside else user_location()
        for ghost in ghosts:
            self.register(ghost, location)
        self.flops[self.interval] += flops_of(func, args, kwargs, out)

    def ran(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:  # noqa: D102
        if self.reads.order:
            self.summary.add(func, args, kwargs)

    def read(self, ghost: Ghost) -> Any:  # noqa: D102
        if self.hooks.running:
            return super().read(ghost)
        self.consume(ghost)
        if self.inside and not self.answering:
            raise RuntimeError("data-dependent control flow inside a unit")
        place, value = self.reads.value(ghost)
        if not self.inside:
            self.reads_at.append((self.interval, place))
        return value

    def shaped_by(self, ghost: Ghost) -> None:  # noqa: D102
        self.read(ghost)
        self.reads.deciding.add(read_site())

    def written(self, func: Any, target: torch.Tensor) -> None:  # noqa: D102
        if self.hooks.running:
            super().written(func, target)
        if self.inside and self.real.is_state(target):
            self.written_tensors.add(target)  # such as running statistics, kept by the stage of the unit
            return
        call, _ = self.fresh.get(storage_key(target), (None, None))
        if call is not None and not self.inside:
            raise WrittenByUnits(call)
        if not self.real.made_in_unit(target):
            self.written_tensors.add(target)
        self.real.overwrite(target)

    @property
    def statistics(self) -> list[Statistic]:
        """Returns the updates of running statistics so far."""
        return self.written_tensors.statistics

    def is_written(self, tensor: Any) -> bool:
        """Returns True for a real tensor that was written with a ghost."""
        return tensor in self.written_tensors or tensor in self.real

    def _ghost_of(self, tensor: torch.Tensor) -> Ghost:
        ghost = ghost_like(tensor.detach(), self)
        self.register(ghost, user_location())
        return ghost

    def _depends_on_values(self, selects: bool) -> None:
        self.depends_on_values |= not self.concrete
        if selects and self.inside and not self.concrete:
            self.calls[-1].selects = True

    # ---- bookkeeping

    def _weights_of(self, func: Any, ghosts: list[Ghost]) -> set[str]:
        """Returns the names of the weights that `func` writes, which may be through views of them."""
        if not self._storages:
            self._storages = {storage_key(g.meta): self.parameters[id(g)] for g in self.ghosts}
        targets = ghosts if func.overloadpacket.__name__.startswith("_foreach") else ghosts[:1]
        return {name for g in targets if (name := self._storages.get(storage_key(g.meta))) is not None}

    def begin_again(self, repeated: Repeated) -> None:
        """Begins a second step, on what the first one has left."""
        self.repeated, self._earlier = repeated, len(self.calls)
        self.free.counts.clear()
        self.fresh.clear()

    def register(self, ghost: Ghost, location: str = "") -> None:
        """Records a new value, computed at `location`."""
        ghost.uid = len(self.values)
        self.values[ghost.uid] = Value(ghost.uid, self.interval, ghost.meta, self.inside, location)

    def consume(self, ghost: Ghost) -> None:
        """Records that a value or parameter is used in the current interval."""
        if self.repeated is not None and id(ghost) in self.repeated.ghosts:
            self.repeated.used.add(id(ghost))
        if ghost.uid in self.values:
            self.values[ghost.uid].last_use = self.interval
        elif id(ghost) in self.parameters and (self.inside or not user_location().startswith(WATCHING)):
            self.uses[self.parameters[id(ghost)]].add(self.interval)

    def consume_all(self, tree: Any) -> None:
        """Records that every ghost in `tree` is used (logged, returned, passed to a metric)."""
        self.written_tensors.used(tree)
        tree_map(lambda x: self.consume(x) if isinstance(x, Ghost) else None, self.real.replaced(tree))

    def listed(self) -> None:
        """Records that code asks for the parameters of a module."""
        self.lists_parameters |= not self.inside and not self.hooks.running

    def gradients(self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Ghost, ...]:
        """Returns a ghost for every gradient; replaces `torch.autograd.grad`."""
        self.takes_gradients = True
        self.consume_all((outputs, inputs))
        sequence = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
        ghosts = [Ghost(torch.empty_like(x, device="meta"), x.device, self) for x in sequence]
        for ghost in ghosts:
            self.register(ghost, user_location())
        return tuple(ghosts)

    # ---- CallHandler

    def metric_call(  # noqa: D102
        self, metric: Any, kind: str, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        with self.free.paused():
            self.consume_all((args, kwargs))
            ghost = Ghost(torch.empty((), device="meta"), torch.device("cpu"), self)
            self.register(ghost)
        return ghost

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:  # noqa: D102
        if self.inside:
            return call(*args, **kwargs)
        with self.free.paused():
            return self._outer_call(name, call, args, kwargs)

    def _outer_call(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        given = args, kwargs
        args, kwargs = self.real.replaced(given)
        if self.reads.order:
            self.summary.add(name, args, kwargs)
        flat, _ = tree_flatten((args, kwargs))
        record = UnitCall(name=name, args=args, kwargs=kwargs, shapes=shapes_of(flat))
        self.calls.append(record)
        self.written_tensors.used(given)
        self.arg_leaves.append({x.uid: i for i, x in reversed(list(enumerate(flat))) if isinstance(x, Ghost)})
        pristine = _copy_objects((args, kwargs))
        record.args, record.kwargs = pristine
        modules = [*self.root.get_submodule(name).modules(), *self._outside]
        effects = SideEffects(modules, (args, kwargs))
        attributes = Attributes(self.root.get_submodule(name).modules())
        self.inside = True
        if self.timeline is not None:
            self.timeline.entered()
        try:
            out = self.real.replaced(self._run_unit(record, call, args, kwargs, flat))
        finally:
            self.inside = False
        if self.timeline is not None:
            self.timeline.left()
        self._name_output(record, len(self.calls) - 1, flat, (out, args, kwargs), attributes)
        record.skippable &= not effects.any(tensors=not record.concrete)
        return out

    def _run_unit(self, record: UnitCall, call: Callable[..., Any], args: tuple, kwargs: dict, flat: list) -> Any:
        """Runs a unit on ghosts; if it reads values, on random values; if these fail its checks, on passing answers."""
        pristine = record.args, record.kwargs
        try:
            with self.real.in_unit():
                return call(*args, **kwargs)
        except _DATA_DEPENDENT:
            copied = _copy_objects(pristine)
        record.reads, self.concrete = True, True
        try:
            out = self._run_concrete(record, call, copied[0], copied[1], flat)
            record.concrete = True
            return out
        except Exception:  # of any class: user code has run on random values
            copied = _copy_objects(pristine)
        finally:
            self.concrete = False
        self.answering = True
        try:
            with self.real.in_unit():
                return call(*copied[0], **copied[1])
        finally:
            self.answering = False

    def _run_concrete(self, record: UnitCall, call: Callable[..., Any], args: Any, kwargs: Any, flat: list) -> Any:
        """Runs a unit that reads values (as a router does) on random values of the right shapes."""
        module = self.root.get_submodule(record.name)
        real = {id(g): _random_like(g) for g in flat if isinstance(g, Ghost)}
        back = {id(t): g for g in flat if isinstance(g, Ghost) for t in [real[id(g)]]}
        inputs = {id(x) for x in flat if isinstance(x, torch.Tensor)}

        def to_ghost(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or id(x) in inputs:
                return x
            if id(x) not in back:
                kept.append(x)  # its id stays its own
                back[id(x)] = ghost_like(x.detach(), self)
                self.register(back[id(x)])
            return back[id(x)]

        kept: list[torch.Tensor] = []
        with ExitStack() as stack:
            for m in module.modules():
                tables: list[Any] = [m.__dict__, own_parameters(m)]  # ghosts may be visible as parameters
                for table in tables:
                    for key, value in list(table.items()):
                        if isinstance(value, Ghost):
                            self.consume(value)
                            table[key] = _random_like(value)
                            stack.callback(table.__setitem__, key, value)
            args, kwargs = tree_map(lambda x: real[id(x)] if isinstance(x, Ghost) else x, (args, kwargs))
            for ghost in flat:
                if isinstance(ghost, Ghost):
                    self.consume(ghost)
            counter = stack.enter_context(FlopCounterMode(display=False))
            attributes = Attributes(module.modules())
            with torch.no_grad():
                out = call(*args, **kwargs)
            attributes.replace_tensors(to_ghost)
        self.flops[self.interval] += counter.get_total_flops()
        return tree_map(to_ghost, out)

    def _name_output(self, record: UnitCall, index: int, flat: list, seen: tuple, attributes: Attributes) -> None:
        """Names the ghosts that a unit has returned, and left in its arguments (after the result) and attributes."""
        record.describe_output(flat, seen[0])
        known = flatten_fields(seen)[0]
        record.describe_attributes(known, flat, attributes)
        given = {id(x) for x in flat}
        for i, leaf in enumerate(known):
            if isinstance(leaf, Ghost) and id(leaf) not in given and leaf.uid in self.values:
                self.names.setdefault(leaf.uid, ("out", index, i))
                self.values[leaf.uid].inside_unit = False

    def _name_results(self, call: FreeCall, args: tuple, out: Any) -> Any:
        """Names the ghosts that the call of a torch function outside units has returned; returns its result."""
        for tensor in tree_flatten(args)[0]:
            if is_plain(tensor):
                self.fresh.setdefault(storage_key(tensor), (None, tensor))
        leaves, spec = tree_flatten(out)
        for i, leaf in enumerate(leaves):
            if call in self.to_ghosts and is_plain(leaf):
                leaves[i] = leaf = ghost_like(leaf, self)
                self.register(leaf, user_location())
            if isinstance(leaf, Ghost) and leaf.uid in self.values:
                self.names.setdefault(leaf.uid, ("free", call, i))
            elif is_plain(leaf):
                self.fresh.setdefault(storage_key(leaf), (call, leaf))
        return tree_unflatten(leaves, spec) if call in self.to_ghosts else out

    # ---- result

    def result(self) -> Trace:
        """Returns the trace of the step, after its end."""
        places, deciding = self.reads.places, self.reads.deciding
        cuts = range(1, len(self.calls))
        contract = StepContract() if self.learned is None else self.learned.contract
        decided = [(interval, places[place].location) for interval, place in self.reads_at if place in deciding]
        decided_at = next((location for _, location in decided), None)
        flow = ValueFlow(
            names=[call.name for call in self.calls],
            values=list(self.values.values()),
            sources=self.names,
            arguments=self.arg_leaves,
            reads=decided,
            told={i: call.name for i, call in enumerate(self.calls) if call.reads and not call.skippable},
            refusals={c: refusal for c in cuts if (refusal := self._refusal_of_state(c)) is not None},
            kept={} if self.learned is None else {c: self.learned.kept(c) for c in cuts},
        )
        return Trace(
            calls=list(self.calls),
            cuts=find_cuts(flow),
            parameter_uses={n: tuple(sorted(self.uses[n])) for n in self.parameters.values() if n in self.uses},
            flops=[self.flops[k] for k in range(-1, len(self.calls))],
            takes_gradients=self.takes_gradients,
            depends_on_values=self.depends_on_values,
            answers=self.reads.answers(),
            free_counts=self.free.counts.copy(),
            written=self.to_ghosts,
            contract=replace(contract, weights=tuple(self.weight_writes.items()), decided_at=decided_at),
            lists_parameters=self.lists_parameters,
            ghost_writes=frozenset(self.written_tensors.places),
        )

    def _refusal_of_state(self, cut: int) -> str | None:
        return self.written_tensors.refusal(cut) or (None if self.learned is None else self.learned.refusal(cut))


def _random_like(ghost: Ghost) -> torch.Tensor:
    if is_differentiable(ghost.dtype):
        return torch.randn(ghost.shape, dtype=ghost.dtype, device=ghost.device) * 0.02
    return torch.zeros(ghost.shape, dtype=ghost.dtype, device=ghost.device)


def _copy_objects(tree: Any) -> Any:
    """Copies objects that a call may change (caches); tensors and plain values are not copied."""
    flat, spec = tree_flatten(tree)
    plain = (torch.Tensor, str, int, float, bool, type(None), nn.Module, torch.dtype, torch.device)
    return tree_unflatten([x if isinstance(x, plain) or callable(x) else deepcopy(x) for x in flat], spec)
