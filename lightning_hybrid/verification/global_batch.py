"""Runs a step on the global batch, as one process does, and averages the steps of the replicas."""

from __future__ import annotations

import pickle

import torch
import torch.distributed as dist

from lightning_hybrid.batches import find_samples, joined_batches
from lightning_hybrid.collectives import first_problem, gather_objects, to_device, to_host
from lightning_hybrid.patching import patched
from lightning_hybrid.verification.differences import mean_over
from lightning_hybrid.verification.effects import on_any_rank
from lightning_hybrid.verification.steps import Outcome, run_in_one_process
from lightning_hybrid.verification.whole_step import WholeStep

_MOST_REPLICAS = 8
"""Replicas whose batches one rank can be expected to run together. Empirical."""


def global_batch(step: WholeStep) -> tuple[tuple, str | None]:
    """Returns the arguments of `training_step` with the samples of all replicas, or why there are none. Collective."""
    engine, args = step.engine, step.args
    replicas, problem, batch = engine.plan.layout.replicas, None, b""
    known = engine.runner.known_samples()
    if replicas > _MOST_REPLICAS:
        problem = f"the samples of {replicas} replicas are too many for one rank"
    elif engine.run.data.batch_weights() is not None:
        problem = "replicas have other numbers of samples"
    elif (found := find_samples(args[0], known)).count is None and not found.has_columns:
        problem = "the batch cannot be joined with those of other replicas"
    else:
        try:
            batch = pickle.dumps(to_host(args[0]))
        except Exception as error:  # noqa: BLE001 -- of classes of the user
            problem = f"the batch cannot be sent to other ranks: {error}"
    problem = first_problem(problem)
    if problem is not None:
        return (), problem
    batches = [pickle.loads(b) for b in gather_objects(batch, engine.mesh.replica_group)]  # noqa: S301 -- of this run
    joined = None
    try:
        joined = joined_batches(batches, known)
    except ValueError as error:
        problem = f"the batches of the replicas have {error}"
    return (to_device(joined, engine.device), *args[1:]), first_problem(problem)


def step_of_global_batch(step: WholeStep, args: tuple, *, stacked: bool) -> Outcome:
    """Runs a step on the global batch, without other replicas. Collective.

    Args:
        step: The step on this replica's batch.
        args: Arguments of `training_step` with the samples of all replicas.
        stacked: Whether `all_gather` returns a tensor with a dimension of one replica, or as in one process as it is.
    """
    with patched(step.engine.run, gathered_alone=lambda tensor: tensor[None] if stacked else tensor):
        return run_in_one_process(step.engine.runner, step.weights, [args], step.kwargs, step.how)


def mean_over_replicas(step: WholeStep, own: Outcome, weight: float) -> Outcome:
    """Returns the mean over the replicas of the loss and the gradients of a step. Collective.

    Args:
        step: The step on this replica's batch.
        own: Its outcome on this replica's batch in one process.
        weight: Weight of this replica's batch.
    """
    engine = step.engine
    group, names = engine.mesh.replica_group, engine.partition.parameters.names
    loss = torch.zeros((), device=engine.device) if own.loss is None else own.loss
    sums = torch.stack([loss.double() * weight, torch.tensor(weight, dtype=torch.float64, device=engine.device)])
    dist.all_reduce(sums, group=group)
    total = float(sums[1]) or 1.0
    (wanted,) = on_any_rank(engine, [own.gradients.get(n) is not None for n in names])
    found = {n: torch.zeros_like(step.weights.values[n]) if (g := own.gradients[n]) is None else g for n in wanted}
    return Outcome(loss=sums[0] / total, gradients=mean_over(group, found, weight / total))
