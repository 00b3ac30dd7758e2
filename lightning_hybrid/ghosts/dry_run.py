"""Runs a step on ghosts, as often as needed to know its data flow and which of the values that it reads decide it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_hybrid._torch_private import gradients_taken_by, own_parameters, tree_map, user_location_in
from lightning_hybrid.ghosts.free_code import FreeCall
from lightning_hybrid.ghosts.ghost import Ghost, ghost_like, parameter_slots
from lightning_hybrid.ghosts.manual import idle_optimizers, optimize_idly
from lightning_hybrid.ghosts.preserve import preserved_module_state
from lightning_hybrid.ghosts.reads import Reads
from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.ghosts.trace import Tracer, WrittenByUnits
from lightning_hybrid.ghosts.units import CallInterceptor
from lightning_hybrid.ghosts.use import StepUse, record_use
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

    Raises:
        PartitionError: If the step fails.
    """
    contexts = [nullcontext] if ready is None else [nullcontext, ready]
    failure: Exception | None = None
    for begun in contexts:
        dry = _DryRun(root, interceptor, step, args, device, context, use_of, begun)
        try:
            return dry.trace()
        except PartitionError:
            raise
        except Exception as error:  # of any class: the user's code raises it
            failure = error
    raise PartitionError(
        f"`layout`: `{step.__name__}` cannot be planned. On tensors that have shapes but no values it fails at "
        f"{user_location_in(failure and failure.__traceback__)} with {type(failure).__name__}: {failure}. Layouts of "
        "`dp` and `fsdp` only, such as 'dp2', need no plan."
    ) from failure


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
    reads: Reads = field(default_factory=Reads)
    written: set[FreeCall] = field(default_factory=set)
    """Calls outside units that create tensors into which units write; these tensors are ghosts."""
    _use: StepUse | None = None

    def trace(self) -> Trace:
        """Returns the trace of the step.

        Raises:
            PartitionError: If units write into too many tensors that the step creates.
            Exception: What the step raises.
        """
        tracer = self.reads.until_it_runs(self._run)
        use = self._use
        if tracer.reads_between_units:
            self.reads.find_deciding(lambda: self._run().summary, tracer.summary)
        trace = tracer.result()
        trace.use = use
        return trace

    def _run(self) -> Tracer:
        """Runs the step, from the start again for each tensor of the step into which units write."""
        for _ in range(_RESTARTS):
            self.reads.order.clear()
            tracer = Tracer(self.root, self.interceptor.units.names, self.reads, frozenset(self.written))
            try:
                self._run_once(tracer)
                return tracer
            except WrittenByUnits as found:
                self.written.add(found.call)
        raise PartitionError(f"`layout`: units write into more than {_RESTARTS} tensors that the step creates.")

    def _run_once(self, tracer: Tracer) -> None:
        root = self.root
        args = tree_map(lambda x: x, self.args)  # containers that the step may change
        with ExitStack() as stack:
            stack.enter_context(preserved_rng(self.device))
            stack.enter_context(preserved_module_state(root))
            stack.enter_context(self.begun())
            idle = None if getattr(root, "automatic_optimization", True) else idle_optimizers(root)
            _replace_parameters(root, tracer, self.device)
            root.__dict__["log"] = lambda name, value, *a, **k: tracer.consume_all(value)
            if idle is not None:
                optimize_idly(root, idle, tracer.consume_all)
            stack.enter_context(self.interceptor.handled_by(tracer))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.context())
            stack.enter_context(gradients_taken_by(tracer.gradients))
            self._use = stack.enter_context(record_use(root, self.use_of)) if self.use_of is not None else None
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # what the step prints about values is said where the values are
            with tracer.real, tracer.free:
                out = self.function(*args)
            out = tracer.real.replaced(_as_tree(out))
            tracer.consume_all(out)
            if tracer.reads_between_units:
                tracer.summary.add("result", out)
                tracer.summary.add_state(root.modules())


def _replace_parameters(root: nn.Module, tracer: Tracer, device: torch.device) -> None:
    """Replaces every parameter of `root` by a ghost of `tracer`; shared parameters become one ghost."""
    ghosts: dict[int, Ghost] = {}
    for name, module, key, parameter in list(parameter_slots(root)):
        if id(parameter) not in ghosts:
            ghost = ghost_like(parameter, tracer, device)
            ghost.requires_grad_(False)
            ghosts[id(parameter)] = ghost
            tracer.parameters[id(ghost)] = name
        own_parameters(module).pop(key, None)
        module.__dict__[key] = ghosts[id(parameter)]
    tracer.ghosts = list(ghosts.values())


def _as_tree(out: Any) -> Any:
    return dict(out) if isinstance(out, dict) else out
