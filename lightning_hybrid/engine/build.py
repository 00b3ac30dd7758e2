"""Builds the first engine of a module: synchronizes weights, plans and partitions the module, reports the plan."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_hybrid._lightning_private import is_overridden
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.first_batch import first_step
from lightning_hybrid.engine.run import Run
from lightning_hybrid.ghosts.deferred_init import recorded_init
from lightning_hybrid.launch.agreement import check_parameters
from lightning_hybrid.metrics.loggers import log_plan, watched_parts
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.plan import Plan
from lightning_hybrid.spec.request import Request

ENGINE, DEFERRED_INIT = "_hybrid_engine", "_hybrid_deferred_init"
"""Names of attributes of a LightningModule: the engine that has partitioned it, and the recorded `configure_model`."""


@contextmanager
def recorded_configure_model(root: pl.LightningModule | None) -> Iterator[None]:
    """Records initialization in `configure_model` without storage; each rank materializes its own part later."""
    if root is None or not is_overridden("configure_model", root):
        yield
        return
    with recorded_init() as deferred_init:
        yield
    if not deferred_init.is_empty or DEFERRED_INIT not in root.__dict__:  # else recorded before a refused layout
        root.__dict__[DEFERRED_INIT] = deferred_init


def build_engine(run: Run, request: Request, present: Engine | None) -> Engine:
    """Plans and partitions the module of `run`, whole or partitioned by another strategy. Collective.

    Args:
        run: The run.
        request: The layout and its options.
        present: The engine of the strategy's last run, which is returned if it has partitioned this module; or None.

    Raises:
        PartitionError: If this rank cannot partition the module; the failure monitor ends the other ranks.
    """
    root, trainer = run.module, run.trainer
    earlier: Engine | None = root.__dict__.get(ENGINE)
    if earlier is not None and earlier is present and earlier.begin_run(run):
        return earlier
    root.__dict__.pop(ENGINE, None)
    if earlier is not None:
        earlier.remove()
    deferred_init = root.__dict__.get(DEFERRED_INIT)
    if earlier is None:
        _check_modules(root, trains=trainer.state.fn == TrainerFn.FITTING)
        check_parameters(root)
    if deferred_init is None:
        _agree_on_weights(root, run.device)
    with nullcontext() if trainer.state.fn == TrainerFn.FITTING else _evaluated(root):
        request = request.for_another_module()
        partition = Engine.plan_partition(run, request, run.data.mesh, partial(first_step, trainer))
    engine = Engine.build(run, request, partition, deferred_init)
    root.__dict__.pop(DEFERRED_INIT, None)
    belong_to(engine)
    _report(run, engine.plan, partition.whole_batch)
    return engine


def _check_modules(root: pl.LightningModule, trains: bool) -> None:
    """Checks that all weights have a shape, that their gradients have memory, and that modules are Python code.

    Raises:
        PartitionError: If a lazy module (`nn.LazyLinear`) has not run yet, for sparse embeddings and for TorchScript.
    """
    for name, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PartitionError(
                f"`{name}` of {type(root).__name__} is a module of TorchScript (`torch.jit`), whose calls cannot be "
                "seen, and whose weights cannot be divided. Use the Python module, and `torch.compile` for speed."
            )
        if trains and isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise PartitionError(
                f"`{name}` ({type(module).__name__}) of {type(root).__name__} has `sparse=True`, so its gradient has "
                "no dense memory that could be summed over ranks or divided. Use `sparse=False`, and another "
                "optimizer than `torch.optim.SparseAdam`."
            )
        if any(is_lazy(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            raise PartitionError(
                f"`{name}` ({type(module).__name__}) of {type(root).__name__} has weights without a shape, which a "
                "first forward gives them, but the ranks agree on all weights, and divide them, before the first "
                f"batch. Run {type(root).__name__} once on an example in `__init__` or `setup`, such as "
                "`with torch.no_grad(): self(example)`, or give the sizes to the modules."
            )


def belong_to(engine: Engine) -> None:
    """Stores `engine` as an attribute of its module, which stays partitioned when the run ends."""
    engine.root.__dict__[ENGINE] = engine
    if engine.divides_weights:
        engine.keep(__deepcopy__=engine.__deepcopy__)


@contextmanager
def _evaluated(root: pl.LightningModule) -> Iterator[None]:
    """Sets all modules to evaluation mode, as Lightning's loops do, and restores each module's mode afterwards."""
    modes = {module: module.training for module in root.modules()}
    root.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _agree_on_weights(root: pl.LightningModule, device: torch.device) -> None:
    """Broadcasts the weights and buffers of rank 0 to all ranks, as DistributedDataParallel does."""
    gpu = dist.get_backend() == "nccl"
    with torch.no_grad():
        for tensor in {id(t): t for t in [*root.parameters(), *root.buffers()]}.values():
            moved = tensor.to(device) if gpu else tensor.contiguous()
            dist.broadcast(moved.detach(), 0)
            tensor.copy_(moved)


def _report(run: Run, plan: Plan, whole_batch: str | None) -> None:
    """Prints the plan on rank 0, with the reason for a single microbatch, and passes the plan to the loggers."""
    if dist.get_rank() == 0:
        # one write: rich prints lines under its progress bar as they come
        print(f"{plan}\n", end="", file=sys.stderr)  # noqa: T201 -- where progress bars and warnings go
        if plan.layout.pp > 1 and whole_batch is not None:
            print(f"1 microbatch: {whole_batch}.", file=sys.stderr)  # noqa: T201
    log_plan(run.trainer, plan.record())
    run.patches.enter_context(watched_parts(run.trainer))
