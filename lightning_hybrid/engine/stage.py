"""Runs the user's step on one microbatch for one stage.

The step starts at its first line on every stage. Units of earlier stages are skipped and return ghosts. On entry of the
stage's first unit the received tensors replace the ghosts. On entry of the next stage's first unit the step is aborted
with `StopStage`, which holds the tensors to send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lightning_hybrid._torch_private import (
    flatten_fields,
    is_plain,
    is_view,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
    user_location,
)
from lightning_hybrid.ghosts.free_code import FreeCall, FreeCalls
from lightning_hybrid.ghosts.ghost import Ghost, ghost_like, unit_of_other_stage
from lightning_hybrid.ghosts.reads import StageObserver
from lightning_hybrid.ghosts.record import CrossingValue, Trace, UnitCall, shapes_of
from lightning_hybrid.ghosts.trees import replace_in_place
from lightning_hybrid.metrics.torchmetrics import Metrics
from lightning_hybrid.spec.errors import PartitionError

_PLAIN = (torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None))
"""Types of arguments that contain no ghost."""


class StopStage(BaseException):
    """Aborts the user's step where the next stage begins. Not an `Exception`, so that user code does not catch it."""

    def __init__(self, values: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.values = values


@dataclass(frozen=True, kw_only=True)
class StageProgram:
    """The unit calls of one stage, for a step function and a shape of microbatch."""

    trace: Trace
    first: int
    """Index of the stage's first unit call; 0 for the first stage."""
    stop: int | None
    """Index of the next stage's first unit call; None for the last stage."""

    @property
    def received(self) -> tuple[CrossingValue, ...]:
        """Tensors that the previous stage sends."""
        return self.trace.cuts[self.first].values if self.first else ()

    @property
    def sent(self) -> tuple[CrossingValue, ...]:
        """Tensors to send to the next stage."""
        return self.trace.cuts[self.stop].values if self.stop is not None else ()

    @property
    def sends_token(self) -> bool:
        """True if a token is sent in training, since the schedule needs a tensor with a gradient."""
        return not any(value.differentiable for value in self.sent)


@dataclass
class StageRun:
    """Handles the unit calls of one run of the step (see `CallInterceptor`)."""

    program: StageProgram
    inputs: Sequence[torch.Tensor]
    device: torch.device
    metrics: Metrics
    observer: StageObserver
    """Observes the ghosts of this rank; answers reads in code that earlier stages run with values."""
    has_weights: Callable[[str], bool] = lambda name: False
    """Returns True for a unit whose weights this rank has."""
    whole_batch: bool = False
    """True if the step runs on one microbatch."""
    calls: int = 0
    own: bool = False
    """True from the entry of the stage's first unit on; code of the user then belongs to this stage."""
    differs: str = ""
    """How the last stage calls other units than the dry run, if it does."""
    _inside: bool = False
    """True while a unit runs."""
    _outputs: dict[tuple[str, Any, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.program
        self.observer.answers = program.trace.answers
        self.own, self._grad = program.first == 0, torch.is_grad_enabled()
        sources = [v.source for v in (*program.sent, *program.received)]
        self._wanted = {call for kind, call, _ in sources if kind == "out"}
        self._named = {call for kind, call, _ in sources if kind == "free"}
        self._ghosts = {call for call in program.trace.written if program.first > 0 and call.interval < program.first}
        self._received_sources = {v.source for v in program.received}
        self._received = {(call, i) for kind, call, i in self._received_sources if kind == "free"}
        named = bool(self._named or self._ghosts)
        self.free = FreeCalls(lambda: self.calls - 1, self._keep_results) if named else None

    def paused(self) -> AbstractContextManager:
        """Returns a context in which calls of torch functions are none of the user's code outside units."""
        return nullcontext() if self.free is None else self.free.paused()

    def _keep_results(self, call: FreeCall, args: tuple, out: Any) -> Any:
        if call not in self._named and call not in self._ghosts:
            return out
        leaves, spec = tree_flatten(out)
        changed = False
        for i, leaf in enumerate(leaves):
            # real on this stage if the operation reads a tensor that earlier stages have written
            if is_plain(leaf) and (call in self._ghosts or (call, i) in self._received):
                leaves[i], changed = ghost_like(leaf, self.observer), True
            self._outputs["free", call, i] = leaves[i]
        return tree_unflatten(leaves, spec) if changed else out

    def metric_call(
        self, metric: Any, kind: Literal["forward", "update"], call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Updates a metric on the stage that computes its input; on other stages the call has no effect."""
        with self.paused():
            if self.own:
                return self.metrics.call(metric, kind, call, args, kwargs)
            return Ghost(torch.empty((), device="meta"), torch.device("cpu"), self.observer)

    def unit_call(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Skips the call, runs it, or aborts the step, depending on the index of the call."""
        if self._inside:  # a module of two parents, which a unit calls
            return call(*args, **kwargs)
        self._inside = True
        try:
            with self.paused():
                return self._unit_call(name, call, args, kwargs)
        finally:
            self._inside = False

    def _unit_call(self, name: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        index, program = self.calls, self.program
        recorded = program.trace.calls
        if index >= len(recorded) or recorded[index].name != name:
            if not self._may_differ:
                self._refuse_call(name)
            self.differs = self.differs or self._other_call(name)
        if index == program.first and index > 0:
            args, kwargs = self._enter(args, kwargs)
        if index == program.stop:
            self._leave(args, kwargs)
        self.calls += 1
        if self.differs:
            self._check_weights(name)
        if index > program.first > 0 and not all(type(x) in _PLAIN for x in (*args, *kwargs.values())):
            # autograd functions of blocks accept tensors only, not ghosts with received tensors
            args, kwargs = replace_in_place(_received, (args, kwargs))
        if index >= program.first:
            out = call(*args, **kwargs)
        elif self._is_like(recorded[index], args, kwargs):
            out = self._skip(index, args, kwargs)
        else:
            with unit_of_other_stage():
                out = self._as_recorded(recorded[index], call(*args, **kwargs))
        if index in self._wanted:
            self._keep_outputs(index, out, (args, kwargs))
        return out

    @property
    def _may_differ(self) -> bool:
        """True in the last stage behind its first call, with the whole batch: nothing else depends on what it calls."""
        return self.whole_batch and self.program.stop is None and self.calls > self.program.first

    def _other_call(self, name: str) -> str:
        recorded = self.program.trace.calls
        expected = f"`{recorded[self.calls].name}`" if self.calls < len(recorded) else "no further module"
        return (
            f"A pipeline needs the same modules to be called in every microbatch. Call {self.calls} was {expected} in "
            f"the dry run and is `{name}` now ({user_location()}). Use `tp`, `dp` or `fsdp`, which allow any control "
            "flow."
        )

    def _refuse_call(self, name: str) -> None:
        raise PartitionError(self._other_call(name))

    def _check_weights(self, name: str) -> None:
        """Checks that this stage has the weights of a unit that the dry run did not call here."""
        if not self.has_weights(name):
            self.calls -= 1
            self._refuse_call(name)

    def _keep_outputs(self, index: int, out: Any, arguments: tuple) -> None:
        """Keeps what a call has returned, and left in lists and dictionaries among its arguments, and in attributes."""
        leaves = flatten_fields(out)[0]
        self._outputs |= {("out", index, i): leaf for i, leaf in enumerate(leaves)}
        left = self.program.trace.calls[index].left
        filled = [*flatten_fields(arguments)[0], *(leaf for attribute in left for leaf in attribute.present())]
        stand_ins: dict[int, Ghost] = {}
        for i, leaf in enumerate(filled, start=len(leaves)):
            # real if it is a tensor that the unit has made, and filled with values that this stage does not have
            received = index < self.program.first and ("out", index, i) in self._received_sources
            if received and is_plain(leaf):
                stand_ins[id(leaf)] = leaf = ghost_like(leaf, self.observer)
            self._outputs["out", index, i] = leaf
        if stand_ins:
            replace_in_place(lambda x: stand_ins.get(id(x), x), arguments)
            for attribute in left:
                attribute.replace(lambda x: stand_ins.get(id(x), x))

    def _is_like(self, record: UnitCall, args: tuple, kwargs: dict) -> bool:
        """Returns True if the results of a call on an earlier stage have the shapes of the dry run."""
        return record.skippable and shapes_of(tree_leaves((args, kwargs))) == record.shapes

    def _as_recorded(self, record: UnitCall, out: Any) -> Any:
        """Returns what a unit of another stage has returned, with ghosts for tensors that it could not fill."""
        leaves, spec = flatten_fields(out)
        if len(leaves) != len(record.leaves):
            return out
        kinds = [kind for kind, _ in record.leaves]
        if not any(kind in ("ghost", "same") and is_plain(x) for x, kind in zip(leaves, kinds, strict=True)):
            return out
        present: list[Any] = []
        for leaf, (kind, value) in zip(leaves, record.leaves, strict=True):
            if kind == "same":
                present.append(present[value])
            else:
                present.append(ghost_like(leaf, self.observer) if kind == "ghost" and is_plain(leaf) else leaf)
        return tree_unflatten(present, spec)

    def _skip(self, index: int, args: tuple, kwargs: dict) -> Any:
        record = self.program.trace.calls[index]
        kinds = [kind for leaves in (record.leaves, *(a.leaves for a in record.left)) for kind, _ in leaves]
        flat = tree_flatten((args, kwargs))[0] if "in" in kinds or record.left else []
        leaves: list[Any] = []
        for kind, value in record.leaves:
            if kind == "ghost":
                leaves.append(Ghost(value, self.device, self.observer))
            else:
                leaves.append(flat[value] if kind == "in" else leaves[value] if kind == "same" else value)
        known = [*leaves, *(flatten_fields((args, kwargs))[0] if record.left else ())]
        for attribute in record.left:
            attribute.rebuild(known, flat, lambda meta: Ghost(meta, self.device, self.observer))
        return tree_unflatten(leaves, record.spec)  # type: ignore[arg-type]

    def _enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.own = True
        self._check_names(self.program.received)
        with torch.set_grad_enabled(self._grad):  # the unit may be called without gradients, the value used with them
            given = tree_flatten((args, kwargs))[0]
            flat = list(given)
            self._materialize(flat)
        present = {id(old): _received(new) for old, new in zip(given, flat, strict=True)}
        return replace_in_place(lambda x: present.get(id(x), x), (args, kwargs))

    def _materialize(self, flat: list[Any]) -> None:
        """Makes the received tensors the values of the ghosts; `flat` has the arguments of the stage's first call."""
        for value, tensor in zip(self.program.received, self.inputs, strict=False):  # and perhaps a token
            if value.written:
                tensor = tensor.clone()  # the received buffer is a leaf of the autograd graph
            elif tensor.requires_grad:
                tensor = _ContiguousGradient.apply(tensor)
            if value.dtype.is_complex:
                tensor = torch.view_as_complex(tensor)
            kind, _, i = value.source
            stand_in = flat[i] if kind == "arg" else self._outputs[value.source]
            if isinstance(stand_in, Ghost):
                stand_in.materialize(tensor)
            if kind == "arg":
                flat[i] = tensor

    def _check_names(self, values: Sequence[CrossingValue]) -> None:
        """Checks that the code outside units has called the same functions as in the dry run, where values need it.

        Raises:
            PartitionError: If it has not.
        """
        for call in (v.source[1] for v in values if v.source[0] == "free"):
            place, trace = (call.interval, call.function), self.program.trace
            now, before = self.free.counts[place] if self.free is not None else 0, trace.free_counts[place]
            if now != before:
                where = f"after `{trace.calls[call.interval].name}`" if call.interval >= 0 else "at its beginning"
                raise PartitionError(
                    f"A pipeline needs the same operations in every microbatch. The step has called `{call.function}` "
                    f"{before} times {where} in the dry run and {now} times now. Use a layout without `pp`, which "
                    "allows any control flow."
                )

    def _leave(self, args: tuple, kwargs: dict) -> None:
        self._check_names(self.program.sent)
        with torch.set_grad_enabled(self._grad):
            values = self._values_to_send(args, kwargs)
        raise StopStage(values)

    def _values_to_send(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, ...]:
        flat, _ = tree_flatten((args, kwargs))
        values = []
        for value in self.program.sent:
            kind, _, i = value.source
            tensor = flat[i] if kind == "arg" else self._outputs[value.source]
            tensor = _received(tensor)
            if isinstance(tensor, Ghost) or not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != value.shape:
                got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else tensor
                raise PartitionError(
                    f"A pipeline needs equal shapes in every microbatch of a step. The tensor before "
                    f"`{self.program.trace.calls[self.program.stop or 0].name}` had shape {value.shape} in the dry "
                    f"run and is {got} now. If its size depends on values of the batch, such as those of a mask, "
                    "select after the last block, keep all elements and multiply by the mask, or use a layout "
                    "without `pp`."
                )
            values.append(_to_send(tensor))
        if torch.is_grad_enabled() and self.program.sends_token:
            values.append(torch.zeros((), device=self.device, requires_grad=True))
        return tuple(values)


class _ContiguousGradient(torch.autograd.Function):
    """Identity with a contiguous gradient, which is sent to the previous stage."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].contiguous()


def _received(value: Any) -> Any:
    """Returns the received tensor of a ghost, and any other value unchanged."""
    return value.received if isinstance(value, Ghost) and value.received is not None else value


def _to_send(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not torch.is_grad_enabled() or not tensor.is_floating_point():
        return tensor.detach().contiguous()
    if not tensor.requires_grad:
        return tensor.detach().contiguous().requires_grad_()  # frozen so far; torch sends a gradient back
    tensor = tensor.contiguous()
    # received tensors that are passed on, and views, which torch cannot detach in place after use
    return tensor.clone() if tensor.is_leaf or is_view(tensor) else tensor
