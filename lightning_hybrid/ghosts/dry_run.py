"""Runs a step on ghosts until its data flow, the values that decide it, and the state that it changes are known."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_hybrid._lightning_private import fresh_optimizers
from lightning_hybrid._torch_private import gradients_taken_by, own_parameters, tree_map, user_location_in
from lightning_hybrid.ghosts.free_code import FreeCall, WrittenByUnits
from lightning_hybrid.ghosts.ghost import Ghost, ghost_like, parameter_slots
from lightning_hybrid.ghosts.learn import Learned, Repeated, Timeline, other_numbers
from lightning_hybrid.ghosts.manual import IdleOptimizer, optimize_idly
from lightning_hybrid.ghosts.parameters import parameters_listed
from lightning_hybrid.ghosts.preserve import preserved_module_state
from lightning_hybrid.ghosts.reads import Reads
from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.ghosts.state import ModuleState
from lightning_hybrid.ghosts.trace import Tracer
from lightning_hybrid.ghosts.units import CallInterceptor
from lightning_hybrid.ghosts.use import StepUse, record_use
from lightning_hybrid.patching import patched
from lightning_hybrid.rng.state import preserved_rng
from lightning_hybrid.spec.errors import PartitionError

_RESTARTS = 64
"""Largest number of tensors, created by the step, into which units write; empirical."""


def trace_step(
    root: nn.Module,
    interceptor: CallInterceptor,
    step: Callable[..., Any],
    args: tuple,
    *,
    device: torch.device,
    context: Callable[[], AbstractContextManager] = nullcontext,
    use_of: Collection[str] | None = None,
    ready: Callable[[], AbstractContextManager] | None = None,
    learn_state: bool = True,
    gradients: bool = True,
) -> Trace:
    """Runs `step(*args)` on ghosts and returns its data flow.

    Args:
        root: The LightningModule; its parameters may be real, sharded or already ghosts. It is not changed.
        interceptor: The installed `CallInterceptor` of `root`.
        step: A bound method of `root`, such as `root.training_step`.
        args: Arguments of `step`; tensors (the microbatch) are real.
        device: The device of the parameters.
        context: Entered around the step (autocast).
        use_of: Names of units for which `Trace.use` is recorded; None: not recorded.
        ready: If the step fails before training has begun: returns a context in which the trainer and the module are
            as at the first batch, and in which the step runs again. Its effects on the module are undone.
        learn_state: Whether to learn which state the step changes, which needs further runs of such a step.
        gradients: Whether the step is one of training: user code may ask whether tensors require gradients.

    Raises:
        PartitionError: If the step fails.
    """
    contexts = [nullcontext] if ready is None else [nullcontext, ready]
    failure: Exception | None = None
    for begun in contexts:
        dry = _DryRun(root, interceptor, step, args, device, context, use_of, begun, learn_state, gradients)
        try:
            return dry.trace()
        except (PartitionError, torch.OutOfMemoryError):  # the memory probe wants to know
            raise
        except Exception as error:  # of any class: the user's code raises it
            failure = error
    raise PartitionError(
        f"`layout`: `{step.__name__}` cannot be planned. On tensors that have shapes but no values it fails at "
        f"{_failure(failure)}. Layouts of `dp` and `fsdp` only, such as 'dp2', need no plan."
    ) from failure


def failure_of_step(error: PartitionError) -> str | None:
    """Returns where and how the user's step has failed in `trace_step`; None if `error` has another cause."""
    return None if error.__cause__ is None else _failure(error.__cause__)


def _failure(error: BaseException | None) -> str:
    return f"{user_location_in(error and error.__traceback__)} with {type(error).__name__}: {error}"


@dataclass
class _DryRun:
    """Runs a step of `root` on ghosts, see `trace_step`."""

    root: nn.Module
    interceptor: CallInterceptor
    function: Callable[..., Any]
    args: tuple
    device: torch.device
    context: Callable[[], AbstractContextManager]
    use_of: Collection[str] | None
    begun: Callable[[], AbstractContextManager]
    learn_state: bool
    gradients: bool
    reads: Reads = field(default_factory=Reads)
    written: set[FreeCall] = field(default_factory=set)
    """Calls outside units that create tensors into which units write; these tensors are ghosts."""
    _use: StepUse | None = None
    _followers: dict[str, set[str]] = field(default_factory=dict)
    _changes_state: bool = False

    def trace(self) -> Trace:
        """Returns the trace of the step.

        Raises:
            PartitionError: If units write into too many tensors that the step creates.
            Exception: What the step raises.
        """
        tracer = self.reads.until_it_runs(self._run)
        use, changes_state = self._use, self._changes_state
        if tracer.reads_at:
            self.reads.find_deciding(lambda: self._run().summary, tracer.summary)
        trace = tracer.result()
        trace.use, trace.followers = use, self._followers
        changes_state = changes_state or (self.learn_state and self._may_change_state())
        return self._with_state(trace) if changes_state else trace

    def _may_change_state(self) -> bool:
        """Returns True if the step changes state by other values that it reads, which are then kept."""
        for _ in self.reads.others():
            try:
                self._run()
            except Exception:  # noqa: BLE001, S112 -- a check of the user's code fails
                continue
            if self._changes_state:
                return True
        return False

    def _run(self) -> Tracer:
        """Runs the step, from the start again for each tensor of the step into which units write."""
        for _ in range(_RESTARTS):
            tracer = self._new_tracer()
            try:
                with self._on_ghosts(tracer):
                    self._run_first(tracer)
                return tracer
            except WrittenByUnits as found:
                self.written.add(found.call)
        raise PartitionError(f"`layout`: units write into more than {_RESTARTS} tensors that the step creates.")

    def _new_tracer(self) -> Tracer:
        self.reads.order.clear()
        return Tracer(self.root, self.interceptor.units.names, self.reads, frozenset(self.written))

    def _run_first(self, tracer: Tracer) -> None:
        """Runs the step, and finds whether it changes state and which weights hooks write."""
        state = ModuleState(self.root)
        before = state.copies() if self.learn_state else {}
        out = self._step(tracer, self.args)
        if tracer.reads_at:
            tracer.summary.add("result", out)
            tracer.summary.add_state(self.root.modules())
        if not self.learn_state:
            return
        self._changes_state = bool(state.changed(before, [statistic.tensor for statistic in tracer.statistics]))
        if isinstance(self.root, pl.LightningModule) and self.function.__name__ == "training_step":
            with preserved_module_state(self.root):
                tracer.hooks.run(self.root, self.args, out)
        self._followers = dict(tracer.hooks.followers)

    def _with_state(self, trace: Trace) -> Trace:
        """Returns `trace`, or that of another run, with what is learned of the state that the step changes."""
        state = ModuleState(self.root)
        first = self._new_tracer()
        with self._on_ghosts(first):
            before = state.copies()
            self._step(first, self.args)
            repeated = Repeated(state, before, first.statistics, first.is_written)
            first.begin_again(repeated)
            repeated.repeat(lambda: self._step(first, self.args))
        second = self._new_tracer()
        with self._on_ghosts(second):
            caches = repeated.caches(lambda: self._step(second, other_numbers(self.args)))
        for _ in self.reads.others() if caches else ():
            with self._on_ghosts(tracer := self._new_tracer()):
                caches = repeated.still_caches(caches, lambda: self._step(tracer, self.args))
        if caches.issuperset(repeated.places):
            return replace(trace, contract=replace(trace.contract, caches=caches))
        third = self._new_tracer()
        with self._on_ghosts(third):
            places = [p for p in repeated.places if p not in caches]
            third.timeline = Timeline(state, places, third.written_tensors)
            with third.timeline.watched():
                self._step(third, self.args)
            calls, units = [call.name for call in third.calls], self.interceptor.units.names
            third.learned = Learned(third.timeline, repeated, caches, calls, units, third.is_written)
            use = self._use
        return replace(third.result(), use=use, followers=trace.followers)

    @contextmanager
    def _on_ghosts(self, tracer: Tracer) -> Iterator[None]:
        """Replaces parameters by ghosts, and what else a step needs; restores the module at exit."""
        root = self.root
        with ExitStack() as stack:
            stack.enter_context(preserved_rng(self.device))
            stack.enter_context(preserved_module_state(root))
            stack.enter_context(self.begun())
            module: Any = root
            manual = None if getattr(root, "automatic_optimization", True) else fresh_optimizers(module)
            ghosts = _replace_parameters(root, tracer, self.device)
            root.__dict__["log"] = lambda name, value, *a, **k: tracer.consume_all(value)
            if manual is not None:
                optimizers, schedulers = manual
                idle = [IdleOptimizer(optimizer, ghosts) for optimizer in optimizers]
                idly = partial(_backward_idly, tracer)
                optimize_idly(root, idle, schedulers, idly)
                stack.enter_context(patched(torch.autograd, backward=idly))  # `loss.backward()` calls it
            stack.enter_context(self.interceptor.handled_by(tracer))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            stack.enter_context(self.context())
            stack.enter_context(gradients_taken_by(tracer.gradients))
            stack.enter_context(parameters_listed(tracer.listed))
            self._use = stack.enter_context(record_use(root, self.use_of)) if self.use_of is not None else None
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # what the step prints about values is said where the values are
            yield

    def _step(self, tracer: Tracer, args: tuple) -> Any:
        """Runs the step; returns its result as a tree."""
        given = tree_map(lambda x: x, args)  # containers that the step may change
        with tracer.real, tracer.written_tensors, tracer.free:
            out = _as_tree(self.function(*given))
        tracer.consume_all(out)
        return tracer.real.replaced(out)


def _backward_idly(tracer: Tracer, losses: Any, *_: Any, **__: Any) -> None:
    """Takes the place of the backward pass in a step with manual optimization."""
    tracer.consume_all(losses)


def _replace_parameters(root: nn.Module, tracer: Tracer, device: torch.device) -> dict[int, Ghost]:
    """Replaces every parameter of `root` by a ghost of `tracer`; shared parameters become one ghost.

    Returns:
        The ghosts by the id of the parameter.
    """
    ghosts: dict[int, Ghost] = {}
    for name, module, key, parameter in list(parameter_slots(root)):
        if id(parameter) not in ghosts:
            ghost = ghost_like(parameter, tracer, device)  # trained or not, as user code may ask
            ghost.requires_grad_(parameter.requires_grad or (isinstance(parameter, Ghost) and parameter.wants_grad))
            ghosts[id(parameter)] = ghost
            tracer.parameters[id(ghost)] = name
        module.__dict__.pop(key, None)
        own_parameters(module)[key] = ghosts[id(parameter)]  # type: ignore[assignment]
    tracer.ghosts = list(ghosts.values())
    return ghosts


def _as_tree(out: Any) -> Any:
    return dict(out) if isinstance(out, dict) else out
