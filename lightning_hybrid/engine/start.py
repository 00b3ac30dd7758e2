"""Before the first step: the trainer's settings, equal weights on all ranks, a first batch, the partition."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_hybrid._lightning_private import running_prediction
from lightning_hybrid.batches import tiled_batch
from lightning_hybrid.compat.averaging import forget_partition
from lightning_hybrid.dataloader.peek import sample_batch
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.ghosts.deferred_init import RecordedInit, recorded_init
from lightning_hybrid.launch.agreement import check_parameters
from lightning_hybrid.metrics.loggers import log_plan, watch_local_parts
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.plan import check_precision, check_trainer, make_partition
from lightning_hybrid.rng.state import preserved_rng
from lightning_hybrid.spec.request import Request

if TYPE_CHECKING:
    from lightning_hybrid.strategy import HybridStrategy

TESTED_TORCH = ("2.13",)
"""Releases with which the tests have passed, oldest first. pyproject.toml allows 2.11 and 2.12, too: they are accepted
without a warning, but no tests have run with them yet. Whoever runs them adds the release here."""


def warn_if_untested() -> None:
    """One warning if torch is newer than the releases this version was tested with."""
    release = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if release > tuple(int(x) for x in TESTED_TORCH[-1].split(".")):
        warnings.warn(
            f"lightning_hybrid was tested with torch {' and '.join(TESTED_TORCH)}; this is torch {torch.__version__}.",
            stacklevel=2,
        )


def prepare_trainer(trainer: pl.Trainer) -> bool:
    """Takes over the splitting of data, and evaluates under `no_grad`.

    A sharded module whose first forward ran in inference mode (sanity validation) cannot train afterwards.

    Returns:
        Whether the user wants data to be split over the replicas (`use_distributed_sampler`).
    """
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False
    # what a step logs is reduced over the replicas already, whatever `sync_dist` says
    warnings.filterwarnings("ignore", message=r".*It is recommended to use `self\.log\(.*sync_dist=True\)`.*")
    wanted = trainer._accelerator_connector.use_distributed_sampler
    trainer._accelerator_connector.use_distributed_sampler = False
    return wanted


def release_trainer(trainer: pl.Trainer, split: bool) -> None:
    """Undoes `prepare_trainer`, so that the trainer can be run again."""
    trainer._accelerator_connector.use_distributed_sampler = split


@contextmanager
def built_on_ghosts(root: pl.LightningModule | None) -> Iterator[None]:
    """Around `configure_model`: what it builds has no storage; each rank makes its own part real afterwards."""
    if root is None or not is_overridden("configure_model", root):
        yield
        return
    with recorded_init() as deferred_init:
        yield
    root.__dict__["_hybrid_tape"] = deferred_init


def partition(trainer: pl.Trainer, strategy: HybridStrategy, request: Request) -> StepRunner:
    """Plans and partitions the trainer's module; collective.

    Raises:
        PartitionError: If this rank cannot partition; the watch ends the others.
    """
    root = trainer.lightning_module
    earlier: Partition | None = root.__dict__.pop("_hybrid_partition", None)
    if earlier is not None:
        forget_partition(root)
        earlier.remove()
    deferred_init: RecordedInit | None = root.__dict__.pop("_hybrid_tape", None)
    if earlier is None:
        check_parameters(root)
    if deferred_init is None:
        _agree_on_weights(root, strategy.root_device)
    root.train(trainer.state.fn == TrainerFn.FITTING)
    precision = strategy.precision_plugin

    def plan() -> Partition:
        check_precision(precision)
        check_trainer(request.layout, trainer)
        return make_partition(
            root, request, strategy.mesh, strategy.root_device, precision.forward_context, lambda: _sample(trainer)
        )

    made = plan()
    made.apply(strategy.root_device, deferred_init)
    root.__dict__["_hybrid_partition"] = made
    if dist.get_rank() == 0:
        print(made.plan, file=sys.stderr)  # noqa: T201 -- where progress bars and warnings go
    log_plan(trainer, made.plan.record())
    watch_local_parts(trainer)
    return StepRunner(root, made, strategy.root_device, precision, request.microbatches)


def _agree_on_weights(root: pl.LightningModule, device: torch.device) -> None:
    """All ranks take the weights and buffers of rank 0, as DistributedDataParallel does."""
    gpu = dist.get_backend() == "nccl"
    with torch.no_grad():
        for tensor in {id(t): t for t in [*root.parameters(), *root.buffers()]}.values():
            moved = tensor.to(device) if gpu else tensor.contiguous()
            dist.broadcast(moved.detach(), 0)
            tensor.copy_(moved)


def leave_quietly() -> NoReturn:
    """Ends a rank whose error rank 0 reports; a little later, since launchers end all ranks when the first one goes."""
    time.sleep(1)
    sys.exit(1)


def _sample(trainer: pl.Trainer) -> tuple[str, tuple]:
    """The step function of the trainer's first step, and its arguments with a first batch on the device."""
    loops: dict[Any, tuple[str, Any]] = {
        TrainerFn.FITTING: ("training_step", trainer.fit_loop),
        TrainerFn.VALIDATING: ("validation_step", trainer.validate_loop),
        TrainerFn.TESTING: ("test_step", trainer.test_loop),
        TrainerFn.PREDICTING: ("predict_step", trainer.predict_loop),
    }
    name, loop = loops[trainer.state.fn]
    with preserved_rng():
        loaders: Any = loop._data_source.dataloader()
    batch, extra = sample_batch(loaders, training=name == "training_step")
    return name, _arguments(trainer, name, batch, 0, extra)


def sample_of_training(trainer: pl.Trainer, batch_size: int | None) -> tuple[str, tuple]:
    """`training_step` and its arguments with a batch of the running training's loaders.

    Args:
        trainer: The trainer.
        batch_size: Samples of the batch; None: as many as the loader's own has.
    """
    batch, _ = sample_batch(trainer.train_dataloader, training=True)
    if batch_size is not None:
        batch = tiled_batch(batch, batch_size)
    return "training_step", _arguments(trainer, "training_step", batch, 0, ())


def _arguments(trainer: pl.Trainer, name: str, batch: Any, number: int, extra: tuple[int, ...]) -> tuple:
    """The arguments with which a loop would call the step `name` for a loader's batch."""
    loader = extra[0] if extra else 0
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
    step = getattr(trainer.lightning_module, name)
    index = (number,) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
    return (batch, *index, *extra)


def prediction_arguments(trainer: pl.Trainer, batch: Any) -> tuple:
    """The arguments of `predict_step` for one more batch of the loader that is being predicted on."""
    loader, loaders, number = running_prediction(trainer)
    return _arguments(trainer, "predict_step", batch, max(0, number - 1), (loader,) if loaders > 1 else ())
