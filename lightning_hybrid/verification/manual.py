"""Gradients of steps with manual optimization, in which the user's code reads and changes them before the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.ghosts.manual import IdleOptimizer, optimize_idly
from lightning_hybrid.verification.differences import mean_over


class Replicas:
    """The replicas of a step in one process: its user code sees the mean of their gradients, as in the real one.

    The step may fail on some ranks; the others then fail in their next backward pass. Use it as a context manager
    around the step, on all ranks.

    Args:
        runner: Runs the steps of the partitioned module.
        weight: Weight of this replica's batch.
    """

    def __init__(self, runner: StepRunner, weight: float) -> None:
        self._any_rank, self._group = runner.run.world.any_rank, runner.mesh.replica_group
        self._device = runner.device
        total = torch.tensor(weight, dtype=torch.float64, device=runner.device)
        dist.all_reduce(total, group=self._group)
        self._share, self._left = weight / (float(total) or 1.0), False

    @contextmanager
    def averaged(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Surrounds a backward pass, whose gradients of `parameters` are those of all replicas afterwards. Collective.

        Raises:
            RuntimeError: If another rank has left the step.
        """
        before = {n: p.grad for n, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        yield
        if self._any_rank(False):
            self._left = True
            raise RuntimeError("the step fails on another rank, or has another number of backward passes there.")
        flags = torch.tensor([float(p.grad is not None) for p in parameters.values()], device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        found = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for (n, p), has in zip(parameters.items(), flags.tolist(), strict=True)
            if has
        }
        means = mean_over(self._group, found, self._share)
        for name, parameter in parameters.items():
            mean, earlier = means.get(name), before[name]
            parameter.grad = earlier if mean is None else mean.clone() if earlier is None else earlier + mean

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._left:
            self._any_rank(True)


def replicas_of(runner: StepRunner, weight: float | None) -> Replicas | nullcontext[None]:
    """Returns the replicas of a step with manual optimization; None for another step, or a step of one rank alone.

    Args:
        runner: Runs the steps of the partitioned module.
        weight: Weight of this replica's batch; None if other ranks do not run the step.
    """
    if weight is None or runner.root.automatic_optimization or runner.mesh.layout.replicas == 1:
        return nullcontext()
    return Replicas(runner, weight)


def optimizes_manually(
    runner: StepRunner, backward: Callable[..., None], divided: Mapping[str, Tensor] = MappingProxyType({})
) -> bool:
    """With manual optimization, makes the step call `backward` and idle optimizers, and returns True.

    Args:
        runner: Runs the steps of the partitioned module.
        backward: Called with the arguments of each `manual_backward`.
        divided: By name the parameters of the optimizers that the present ones replace.
    """
    root, parameters = runner.root, runner.partition.parameters
    if not root.automatic_optimization:
        replaced = {id(p): parameters[name] for name, p in divided.items()}
        idle = [IdleOptimizer(optimizer, replaced) for optimizer in root.trainer.optimizers]
        schedulers = [config.scheduler for config in root.trainer.lr_scheduler_configs]
        optimize_idly(root, idle, schedulers, backward)
    return not root.automatic_optimization
