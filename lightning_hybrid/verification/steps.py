"""Runs one training step without effect: under the layout, and on the whole module as one process would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hybrid._lightning_private import training_batch
from lightning_hybrid._torch_private import BatchNorm, version_of
from lightning_hybrid.batches import copied_batch, count_samples
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.engine.loss_weights import loss_of, mean_loss, weight_of
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.engine.trials import KeptValues, preserved_trained, preserved_training_state, step_undone
from lightning_hybrid.ghosts.contract import StatePlace
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.preserve import preserved_module_state
from lightning_hybrid.ghosts.state import ModuleState
from lightning_hybrid.ghosts.trees import tensors_of
from lightning_hybrid.metrics.logs import LogCalls, LogEntry, LogRecorder, silent
from lightning_hybrid.patching import patched
from lightning_hybrid.rng.state import preserved_rng
from lightning_hybrid.verification.gradient_code import gradient_code
from lightning_hybrid.verification.manual import optimizes_manually, replicas_of
from lightning_hybrid.verification.randomness import common_randomness
from lightning_hybrid.verification.reported import Reported, reported
from lightning_hybrid.verification.state import State, changed_leaves, leaves_of
from lightning_hybrid.verification.whole import Weights, whole_module

Outputs = dict[tuple[str, int], list[tuple[float, float]]]
"""Mean and norm of the tensors that units returned, by unit and number of its earlier calls."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions of the compared steps."""

    equal_rows: bool = False
    """True if random tensors have equal rows, see `verification.randomness`."""
    watch: bool = False
    """True to record the outputs of units."""


class OfParts(NamedTuple):
    """Losses and `self.log` calls of a step on parts of a batch."""

    losses: list[tuple[Tensor, float]]
    """The losses, each with its weight."""
    weights: list[float] | None
    """The weight of each part; None if the step returns none."""
    calls: LogCalls


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a step on this replica's batch."""

    loss: Tensor | None
    """The loss as the user's step returned it; None if the step returned none."""
    gradients: Mapping[str, Tensor | None]
    """Gradients by name: of this rank's parts under the layout, of whole parameters otherwise."""
    weight: float | None = None
    """Weight that the user's step returned with the loss; None if it returned none."""
    parts: int = 1
    """Number of microbatches."""
    outputs: Outputs = field(default_factory=dict)
    state: State = field(default_factory=dict)
    """The state that the step has changed."""
    shared: Set[StatePlace] | None = None
    """The places of the state that all stages of a pipeline have; None for all places."""
    acts: str | None = None
    """A line of the user's code that acts on gradients within the backward pass; None: there is none."""
    written: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters that the step has given other values, by name, as in `gradients`."""
    reported: Reported = Reported({}, ())  # noqa: RUF009 -- immutable
    """Values that the step has returned and logged."""
    of_parts: OfParts | None = None
    """The same and the loss for each part of the batch, in one process."""


def run_under_layout(runner: StepRunner, args: tuple, kwargs: dict[str, Any], how: Conditions) -> Outcome:
    """Runs a training step forward and backward under the layout, without effect. Collective.

    Args:
        runner: Runs the steps of the partitioned module.
        args: Arguments of `training_step`, which are not changed.
        kwargs: Keyword arguments of `training_step`.
        how: The conditions of the compared steps.
    """
    root, local = runner.root, runner.partition.parameters.local()
    programs = {} if runner.pipeline is None else runner.pipeline.prepared
    losses: list[tuple[Tensor, float]] = []

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append((loss.detach(), 1.0))
        with runner.backward():
            runner.precision.backward(runner.scaled_for_backward(loss), root, None, *args, **kwargs)
        runner.gradients_complete()

    with ExitStack() as stack:
        stack.enter_context(runner.gradients.synchronized())
        stack.callback(runner.gradients.resume)  # the step may have unfrozen weights
        stack.enter_context(step_undone(runner))
        stack.callback(runner.gradients.release)
        optimizers = [] if root.automatic_optimization else root.trainer.optimizers
        values = stack.enter_context(preserved_training_state(list(local.values()), optimizers))
        outputs = stack.enter_context(compared_conditions(runner, how))
        if runner.noise is not None:
            runner.noise.measures = False
            runner.noise = None
        with patched(runner, _log=lambda *_: None):
            manual = optimizes_manually(runner, backward)
            batch_weights = runner.run.data.batch_weights()
            copies, options = copied_batch(args), copied_batch(kwargs)
            before = ModuleState(root).copies()
            out = runner.weighted_step(batch_weights, 1.0, *copies, samples=runner.known_samples(), **options)
            present = ModuleState(root)
            state = changed_leaves(present, before)
            shared = None if runner.pipeline is None else {c.place for c in runner.pipeline.contract.changes}
            if shared is not None:
                state = {place: leaves_of(present.get(place)) for place in shared}
            loss = _loss_of(out)
            entries: list[LogEntry] = []
            if runner.context is not None:
                entries = runner.context.recorder.reduced(runner.context.loss_weights)
                runner.loss_weights.take(runner.context, runner.run.world.any_rank)
            given = reported([out], [1], entries)
            if runner.pipeline is not None:
                stages = gather_objects(given.logged, runner.mesh.group("pp"))
                given = given._replace(logged=list(chain.from_iterable(stages)))
            if loss is not None and not manual:
                backward(loss)
        if runner.partition.missing is not None:
            runner.partition.missing.settle()
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in local.items()}
        written = _written(local, values)
        parts = 1 if runner.pipeline is None else runner.pipeline.parts
        weights = None if runner.context is None else runner.context.loss_weights
        weight = None if weights is None else sum(weights)
        made = dict(programs)
    programs.update(made)  # the real step runs the same ones
    return Outcome(
        loss=mean_of(losses),
        gradients=gradients,
        weight=weight,
        parts=parts,
        outputs=outputs,
        state=state,
        shared=shared,
        written=written,
        reported=given,
    )


def run_in_one_process(
    runner: StepRunner,
    weights: Weights,
    parts: Sequence[tuple],
    kwargs: dict[str, Any],
    how: Conditions,
    share: float | None = None,
) -> Outcome:
    """Runs a training step forward and backward on the whole module, on this replica's batch.

    Collective with manual optimization, if `share` is given.

    Args:
        runner: Runs the steps of the partitioned module.
        weights: The whole weights.
        parts: Arguments of `training_step` for each equal part of the batch; loss and gradients are means over the
            parts, by the weights that the step returns, if any. Losses are scaled first, as in a pipeline.
        kwargs: Keyword arguments of `training_step`.
        how: The conditions of the compared steps.
        share: Weight of this replica's batch, if all ranks run the step: with manual optimization the step then sees
            the mean of the gradients of all replicas.
    """
    found: list[tuple[Tensor, float]] = []
    weighted, state, written = False, State(), dict[str, Tensor]()
    divided, recorder = runner.partition.parameters.local(), LogRecorder(runner.root)
    outs, samples, loss_weights = list[Any](), list[int](), list[float]()
    with ExitStack() as stack:
        replicas = stack.enter_context(replicas_of(runner, share))
        whole = stack.enter_context(whole_module(runner.partition, weights))
        outputs = stack.enter_context(compared_conditions(runner, how))

        lines = stack.enter_context(gradient_code(runner))
        values = KeptValues(whole.values())

        def backward(loss: Tensor, *args: Any, weight: float = 1.0, **kwargs: Any) -> None:
            found.append((loss.detach(), weight))
            with nullcontext() if replicas is None else replicas.averaged(whole):
                runner.precision.backward(loss * (weight / len(parts)), runner.root, None, *args, **kwargs)

        for index, part in enumerate(parts):
            with _undone(runner, values):
                manual = optimizes_manually(runner, backward, divided)
                before = ModuleState(runner.root).copies()
                samples.append(count_samples(part[0]))
                with recorder.recording(samples[-1], microbatch=index):
                    outs.append(_forward(runner, part, kwargs))
                loss, weight = _loss_of(outs[-1]), weight_of(outs[-1])
                loss_weights.append(0.0 if weight is None else weight)
                state = changed_leaves(ModuleState(runner.root), before)
                weighted |= weight is not None
                if loss is not None and not manual:
                    with silent(runner.root):
                        backward(loss, weight=1.0 if weight is None else weight)
                written = _written(whole, values)
        total = sum(weight for _, weight in found)
        of_parts = OfParts(found, loss_weights if weighted else None, recorder.calls)
        divisor = total / len(parts) if weighted else 1.0
        gradients = {n: None if p.grad is None else p.grad / (divisor or 1.0) for n, p in whole.items()}
        if any(isinstance(value, Ghost) for value in (*gradients.values(), *(loss for loss, _ in found))):
            raise RuntimeError("the step computes with values of other pipeline stages that hooks have kept")
    return Outcome(
        loss=mean_of(found),
        gradients=gradients,
        weight=total if weighted else None,
        outputs=outputs,
        state=state,
        acts=next(iter(lines), None),
        written=written,
        reported=reported(outs, samples, recorder.reduced(of_parts.weights)),
        of_parts=of_parts,
    )


def mean_in_one_process(
    runner: StepRunner,
    weights: Weights,
    batches: Sequence[tuple],
    kwargs: dict[str, Any],
    how: Conditions,
    shares: Sequence[float],
    *,
    scale: float | None,
) -> Outcome:
    """Returns the mean over steps of the whole module, by their weights: of the losses, and of the gradients if wanted.

    BatchNorm uses its running statistics: its batch is the global one, whatever the samples of this rank.

    Args:
        runner: Runs the steps of the partitioned module.
        weights: The whole weights.
        batches: The arguments of each training step.
        kwargs: Keyword arguments of `training_step`.
        how: The conditions of the compared steps.
        shares: The weight of each step that returns no weight.
        scale: Factor on the losses in the backward pass, which is undone in the gradients; None: no gradients.

    Raises:
        RuntimeError: If a step with manual optimization writes weights, on which its later losses depend.
    """
    found: list[tuple[Tensor, float]] = []
    sums: dict[str, Tensor] = {}
    share = 1.0
    divided = runner.partition.parameters.local()

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        found.append((loss.detach(), share))
        if scale is not None:
            with _added_to(sums, whole, share / scale):
                runner.precision.backward(loss * scale, runner.root, None, *args, **kwargs)

    with whole_module(runner.partition, weights) as whole, compared_conditions(runner, how), ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(scale is not None))
        stack.enter_context(patched(runner.partition, alone=lambda: True))  # replicas may have other numbers of parts
        for module in runner.root.modules():
            if isinstance(module, BatchNorm):
                stack.enter_context(patched(module, training=False))
        values = KeptValues(whole.values())
        for args, share in zip(batches, shares, strict=True):
            with _undone(runner, values), silent(runner.root):
                manual = optimizes_manually(runner, backward, divided)
                written = sum(map(version_of, whole.values()))
                out = _forward(runner, args, kwargs)
                loss, weight = _loss_of(out), weight_of(out)
                if (
                    manual and sum(map(version_of, whole.values())) != written
                ):  # as SAM does, by gradients of all samples
                    raise RuntimeError("the step writes weights")
                share = share if weight is None else weight  # noqa: PLW2901 -- of the backward pass
                if loss is not None and not manual:
                    backward(loss)
    if any(isinstance(value, Ghost) for value in (*sums.values(), *(loss for loss, _ in found))):
        raise RuntimeError("the step computes with values of other pipeline stages that hooks have kept")
    total = sum(weight for _, weight in found) or 1.0
    return Outcome(loss=mean_of(found), gradients={name: gradient / total for name, gradient in sums.items()})


@contextmanager
def _added_to(sums: dict[str, Tensor], parameters: Mapping[str, Tensor], factor: float) -> Iterator[None]:
    """Adds to `sums` the gradients that a backward pass in the context gives, multiplied by `factor`.

    Afterwards parameters have the sums of all their gradients, which user code may change: a step with manual
    optimization clips them by their norm, which is that of all samples only under a layout.
    """
    kept = {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    yield
    for name, parameter in parameters.items():
        before, gradient = kept[name], parameter.grad
        if gradient is not None:
            sums[name] = sums.get(name, 0.0) + gradient * factor
            parameter.grad = gradient if before is None else before + gradient
        else:
            parameter.grad = before


def _written(parameters: Mapping[str, Tensor], values: KeptValues) -> dict[str, Tensor]:
    """Returns the present values of the parameters that have others than the kept ones."""
    named = zip(parameters.items(), values.changed(), strict=True)
    return {name: parameter.detach().clone() for (name, parameter), changed in named if changed}


@contextmanager
def _undone(runner: StepRunner, weights: KeptValues) -> Iterator[None]:
    """Restores everything but gradients after a step."""
    parameters = list(runner.partition.parameters.local().values())
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(runner.device))
        stack.enter_context(preserved_module_state(runner.root))
        stack.enter_context(preserved_trained(parameters))
        stack.callback(weights.restore)
        yield


@contextmanager
def step_of_one_process_undone(runner: StepRunner, weights: Iterable[Tensor]) -> Iterator[None]:
    """Restores everything after steps of the whole module, whose parameters are `weights`."""
    with _undone(runner, KeptValues(weights)):
        yield


def _forward(runner: StepRunner, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs the user's step with the whole module."""
    root = runner.root
    with runner.rng.training(training_batch(root.trainer)), runner.run.step_context(training=True):
        runner.rng.begin(0)
        return root.training_step(*copied_batch(args), **copied_batch(kwargs))


@contextmanager
def compared_conditions(runner: StepRunner, how: Conditions) -> Iterator[Outputs]:
    """The conditions that all compared steps share: random numbers, no compilation; records outputs of units."""
    interceptor, found = runner.partition.interceptor, Outputs()
    calls: dict[str, int] = {}

    def left(name: str, out: Any) -> None:
        number = calls[name] = calls.get(name, -1) + 1
        tensors = [t.detach() for t in tensors_of(out)]
        if not any(isinstance(t, Ghost) for t in tensors):
            found[name, number] = [_summary(t) for t in tensors]

    with ExitStack() as stack:
        stack.enter_context(common_randomness(runner.root, runner.rng, how.equal_rows))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if how.watch:
            stack.enter_context(patched(interceptor, watcher=left))
        yield found


def _summary(tensor: Tensor) -> tuple[float, float]:
    values = tensor.abs() if tensor.is_complex() else tensor
    values = values.double()
    return float(values.mean()) if values.numel() else 0.0, float(values.norm())


def _loss_of(out: Any) -> Tensor | None:
    loss = loss_of(out)
    return loss if isinstance(loss, Tensor) else None


def mean_of(found: Sequence[tuple[Tensor, float]]) -> Tensor | None:
    """Returns the mean of losses by their weights; None if there are none."""
    return mean_loss(*zip(*found, strict=True)) if found else None
