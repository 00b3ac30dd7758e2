"""The dry run: runs the user's step once on ghost parameters, and records its data flow and its cost.

Time is counted in unit calls: **interval** k is the time from the entry of unit call k to the entry of unit call k + 1;
interval -1 is the time before the first call. Cutting at call c puts the intervals before c on one stage and the rest
on the next; every value computed before c and consumed at or after c crosses the cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_hybrid._torch_private import (
    FLASH_ATTENTION_CPU,
    GROUPED_MM,
    gradients_taken_by,
    is_mutable,
    is_plain,
    own_parameters,
    storage_key,
    tree_flatten,
    tree_map,
    tree_unflatten,
    user_location,
)
from lightning_hybrid.ghosts.cuts import Source, Value, ValueFlow, find_cuts
from lightning_hybrid.ghosts.free_code import FreeCall, FreeCalls
from lightning_hybrid.ghosts.ghost import (
    Ghost,
    GhostObserver,
    GhostWriteError,
    ghost_like,
    is_differentiable,
    parameter_slots,
)
from lightning_hybrid.ghosts.manual import idle_optimizers, optimize_idly
from lightning_hybrid.ghosts.preserve import preserved_module_state
from lightning_hybrid.ghosts.record import Trace, UnitCall
from lightning_hybrid.ghosts.side_effects import SideEffects, modules_outside
from lightning_hybrid.ghosts.units import CallInterceptor
from lightning_hybrid.ghosts.use import record_use
from lightning_hybrid.rng.state import preserved_rng
from lightning_hybrid.spec.errors import PartitionError

_RESTARTS = 64
"""Largest number of tensors, created by the step, into which units write; empirical."""
_CONSTANTS = (str, bytes, int, float, complex, type(None))
_DATA_DEPENDENT = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError)


class WrittenByUnits(BaseException):
    """Restarts the dry run: a tensor that the step creates is written by units, and becomes a ghost."""

    def __init__(self, call: FreeCall) -> None:
        super().__init__()
        self.call = call


class Tracer(GhostObserver):
    """Records one step; see `trace_step`."""

    def __init__(self, root: nn.Module, units: Collection[str], written: frozenset[FreeCall]) -> None:
        self.root = root
        self.calls: list[UnitCall] = []
        self.values: dict[int, Value] = {}
        self.names: dict[int, Source] = {}
        self.arg_leaves: list[dict[int, int]] = []
        self.parameters: dict[int, str] = {}
        self.uses: dict[str, set[int]] = defaultdict(set)
        self.flops: dict[int, float] = defaultdict(float)
        self.reads: list[tuple[int, str]] = []
        self.ghosts: list[Ghost] = []
        """The ghosts of parameters, kept alive so that their ids stay unique."""
        self.free = FreeCalls(lambda: self.interval, self._name_results)
        self.fresh: dict[int, tuple[FreeCall | None, torch.Tensor]] = {}
        """By storage: the call outside units that has created a real tensor; None for tensors from before the step."""
        self.to_ghosts = written
        self._outside = modules_outside(root, units)
        self.inside = self.takes_gradients = False

    @property
    def interval(self) -> int:
        """Returns the current interval."""
        return len(self.calls) - 1

    # ---- GhostObserver

    # Described in `GhostObserver` and `CallHandler`.

    def used(self, func: Any, ghosts: list[Ghost]) -> None:  # noqa: D102
        written = is_mutable(func)
        for ghost in ghosts:
            self.consume(ghost)
            if written and ghost.uid in self.values and ghost is ghosts[0]:
                self.values[ghost.uid].last_write = self.interval

    def made(self, func: Any, args: tuple, kwargs: dict, out: Any, ghosts: list[Ghost]) -> None:  # noqa: D102
        location = "" if self.inside else user_location()
        for ghost in ghosts:
            self.register(ghost, location)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops[self.interval] += count(*args, **kwargs, out_val=out)
        elif func.overloadpacket is GROUPED_MM:
            self.flops[self.interval] += 2 * args[0].numel() * args[1].shape[-1]  # each row goes to one group
        elif func.overloadpacket is FLASH_ATTENTION_CPU:
            query, key = args[0], args[1]
            self.flops[self.interval] += 4 * query.numel() * key.shape[-2]

    def read(self, ghost: Ghost) -> Any:  # noqa: D102
        self.consume(ghost)
        if self.inside:
            raise RuntimeError("data-dependent control flow inside a unit")
        self.reads.append((self.interval, user_location()))
        return False if ghost.dtype == torch.bool else 1.0 if ghost.dtype.is_floating_point else 1

    def written(self, func: Any, target: torch.Tensor) -> None:  # noqa: D102
        if self.inside:
            return  # a buffer (running statistics), kept by the stage of the unit
        call, _ = self.fresh.get(storage_key(target), (None, None))
        if call is not None:
            raise WrittenByUnits(call)
        super().written(func, target)

    # ---- bookkeeping

    def register(self, ghost: Ghost, location: str = "") -> None:
        """Records a new value, computed at `location`."""
        ghost.uid = len(self.values)
        self.values[ghost.uid] = Value(ghost.uid, self.interval, ghost.meta, self.inside, location)

    def consume(self, ghost: Ghost) -> None:
        """Records that a value or parameter is used in the current interval."""
        if ghost.uid in self.values:
            self.values[ghost.uid].last_use = self.interval
        elif id(ghost) in self.parameters:
            self.uses[self.parameters[id(ghost)]].add(self.interval)

    def consume_all(self, tree: Any) -> None:
        """Records that every ghost in `tree` is used (logged, returned, passed to a metric)."""
        tree_map(lambda x: self.consume(x) if isinstance(x, Ghost) else None, tree)

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
        flat, _ = tree_flatten((args, kwargs))
        record = UnitCall(name=name, args=args, kwargs=kwargs)
        self.calls.append(record)
        self.arg_leaves.append({x.uid: i for i, x in reversed(list(enumerate(flat))) if isinstance(x, Ghost)})
        pristine = _copy_objects((args, kwargs))
        record.args, record.kwargs = pristine
        modules = [*self.root.get_submodule(name).modules(), *self._outside]
        effects = SideEffects(modules, (args, kwargs))
        self.inside = True
        try:
            try:
                out = call(*args, **kwargs)
            except _DATA_DEPENDENT:
                copied = _copy_objects(pristine)
                out = self._run_concrete(record, call, copied[0], copied[1], flat)
        finally:
            self.inside = False
        self._remember_output(record, len(self.calls) - 1, flat, out)
        record.skippable &= not effects.any(tensors=not record.concrete)
        return out

    def _run_concrete(self, record: UnitCall, call: Callable[..., Any], args: Any, kwargs: Any, flat: list) -> Any:
        """Runs a unit that reads values (as a router does) on random values of the right shapes."""
        record.concrete = True
        module = self.root.get_submodule(record.name)
        real = {id(g): _random_like(g) for g in flat if isinstance(g, Ghost)}
        back = {id(t): g for g in flat if isinstance(g, Ghost) for t in [real[id(g)]]}
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
            with torch.no_grad():
                out = call(*args, **kwargs)
        self.flops[self.interval] += counter.get_total_flops()
        inputs = {id(x) for x in flat if isinstance(x, torch.Tensor)}

        def to_ghost(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or id(x) in inputs:
                return x
            if id(x) in back:
                return back[id(x)]
            ghost = ghost_like(x.detach(), self)
            self.register(ghost)
            return ghost

        return tree_map(to_ghost, out)

    def _remember_output(self, record: UnitCall, index: int, flat: list, out: Any) -> None:
        leaves, record.spec = tree_flatten(out)
        positions = {id(x): i for i, x in enumerate(flat) if not isinstance(x, _CONSTANTS)}
        for i, leaf in enumerate(leaves):
            if id(leaf) in positions:
                record.leaves.append(("in", positions[id(leaf)]))
            elif isinstance(leaf, Ghost):
                record.leaves.append(("ghost", leaf.meta))
                self.names.setdefault(leaf.uid, ("out", index, i))
                if leaf.uid in self.values:
                    self.values[leaf.uid].inside_unit = False
            else:
                record.skippable &= leaf is None
                record.leaves.append(("value", leaf))

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

    def result(self, parameter_names: list[str]) -> Trace:
        """Returns the trace of the step, after its end."""
        flow = ValueFlow(
            names=[call.name for call in self.calls],
            values=list(self.values.values()),
            sources=self.names,
            arguments=self.arg_leaves,
            reads=self.reads,
            told={i: call.name for i, call in enumerate(self.calls) if call.concrete and not call.skippable},
        )
        uses = {n: tuple(sorted(self.uses[n])) for n in parameter_names if n in self.uses}
        flops = [self.flops[k] for k in range(-1, len(self.calls))]
        return Trace(
            calls=self.calls,
            cuts=find_cuts(flow),
            parameter_uses=uses,
            flops=flops,
            free_counts=self.free.counts,
            written=self.to_ghosts,
        )


def trace_step(
    root: nn.Module,
    interceptor: CallInterceptor,
    step: Callable[..., Any],
    args: tuple,
    *,
    device: torch.device,
    context: Callable[[], AbstractContextManager] = nullcontext,
    use_of: Collection[str] | None = None,
) -> Trace:
    """Runs `step(*args)` once on ghosts and returns its data flow.

    Args:
        root: The LightningModule; its parameters may be real, sharded or already ghosts. It is not changed.
        interceptor: The installed `CallInterceptor` of `root`.
        step: A bound method of `root`, such as `root.training_step`.
        args: Arguments of `step`; tensors (the microbatch) are real.
        device: The device of the parameters.
        context: Entered around the step (autocast).
        use_of: Names of units for which `Trace.use` is recorded; None: not recorded.

    Raises:
        PartitionError: If the step writes values of ghosts to real tensors.
    """
    written: frozenset[FreeCall] = frozenset()
    for _ in range(_RESTARTS):
        try:
            return _trace_once(root, interceptor, step, args, device, context, use_of, written)
        except WrittenByUnits as found:
            written |= {found.call}
    raise PartitionError(f"`layout`: units write into more than {_RESTARTS} tensors that the step creates.")


def _trace_once(
    root: nn.Module,
    interceptor: CallInterceptor,
    step: Callable[..., Any],
    args: tuple,
    device: torch.device,
    context: Callable[[], AbstractContextManager],
    use_of: Collection[str] | None,
    written: frozenset[FreeCall],
) -> Trace:
    tracer = Tracer(root, interceptor.units.names, written)
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(device))
        stack.enter_context(preserved_module_state(root))
        idle = None if getattr(root, "automatic_optimization", True) else idle_optimizers(root)
        names = _replace_parameters(root, tracer, device)
        root.__dict__["log"] = lambda name, value, *a, **k: tracer.consume_all(value)
        if idle is not None:
            optimize_idly(root, idle, tracer.consume_all)
        stack.enter_context(interceptor.handled_by(tracer))
        stack.enter_context(torch.no_grad())
        stack.enter_context(context())
        stack.enter_context(gradients_taken_by(tracer.gradients))
        use = stack.enter_context(record_use(root, use_of)) if use_of is not None else None
        try:
            with tracer.free:
                out = step(*args)
        except GhostWriteError as error:
            raise PartitionError(f"`layout`: this module cannot be split into pipeline stages: {error}") from error
        tracer.consume_all(_as_tree(out))
    trace = tracer.result(names)
    trace.use, trace.takes_gradients = use, tracer.takes_gradients
    return trace


def _replace_parameters(root: nn.Module, tracer: Tracer, device: torch.device) -> list[str]:
    """Replaces every parameter of `root` by a ghost of `tracer`; shared parameters become one ghost."""
    ghosts: dict[int, Ghost] = {}
    names: list[str] = []
    for name, module, key, parameter in list(parameter_slots(root)):
        if id(parameter) not in ghosts:
            ghost = ghost_like(parameter, tracer, device)
            ghost.requires_grad_(False)
            ghosts[id(parameter)] = ghost
            names.append(name)
            tracer.parameters[id(ghost)] = name
        own_parameters(module).pop(key, None)
        module.__dict__[key] = ghosts[id(parameter)]
    tracer.ghosts = list(ghosts.values())
    return names


def _random_like(ghost: Ghost) -> torch.Tensor:
    if is_differentiable(ghost.dtype):
        return torch.randn(ghost.shape, dtype=ghost.dtype, device=ghost.device) * 0.02
    return torch.zeros(ghost.shape, dtype=ghost.dtype, device=ghost.device)


def _copy_objects(tree: Any) -> Any:
    """Copies objects that a call may change (caches); tensors and plain values are not copied."""
    flat, spec = tree_flatten(tree)
    plain = (torch.Tensor, str, int, float, bool, type(None), nn.Module, torch.dtype, torch.device)
    return tree_unflatten([x if isinstance(x, plain) or callable(x) else deepcopy(x) for x in flat], spec)


def _as_tree(out: Any) -> Any:
    return dict(out) if isinstance(out, dict) else out
