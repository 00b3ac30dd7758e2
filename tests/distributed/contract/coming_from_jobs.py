"""Training as docs/coming-from.md has it under "before", and by `HybridStrategy`; each returns the loss of every step.

The programs follow the documentation of torch, Lightning, accelerate and DeepSpeed. They run on every rank of a group.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler

from tests.distributed.contract.jobs import make_trainer, start
from tests.distributed.jobs import Classifier, Numbers

SAMPLES, BATCH, ACCUMULATE, CLIP = 64, 8, 2, 1.0
"""Samples, those of a batch of all ranks, batches of a step, and the norm at which gradients are clipped."""


class Losses(L.Callback):
    """The losses of each step, as Lightning has them on this rank."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self._own: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._own.append(float(trainer.callback_metrics["loss_step"]))
        if len(self._own) == ACCUMULATE:
            self.found.append(sum(self._own) / ACCUMULATE)
            self._own = []


def _mean(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def hybrid(layout: str, clips: bool = True) -> list[float]:
    """Trains with `HybridStrategy`."""
    start()
    module, losses = Classifier(), Losses()
    options: dict[str, Any] = {"accumulate_grad_batches": ACCUMULATE, "max_epochs": 1, "callbacks": [losses]}
    trainer, n = make_trainer(layout, gradient_clip_val=CLIP if clips else None, **options)
    trainer.fit(module, DataLoader(Numbers(SAMPLES), batch_size=BATCH // n))
    return losses.found


def _in_order(replicas: int) -> DataLoader:
    """The samples of this rank; Lightning's own sampler shuffles them, also where the loader does not."""
    dataset, rank = Numbers(SAMPLES), dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])
    sampler = DistributedSampler(dataset, replicas, rank % replicas, shuffle=False)
    return DataLoader(dataset, batch_size=BATCH // replicas, sampler=sampler)


def order(hybrid: bool) -> list[int]:
    """The samples that this rank reads first, from a loader that does not shuffle."""
    start()
    seen = Seen()
    options: dict[str, Any] = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    trainer, _ = make_trainer("dp2" if hybrid else None, max_steps=1, callbacks=[seen], **({} if hybrid else options))
    trainer.fit(Classifier(), DataLoader(Numbers(SAMPLES), batch_size=BATCH // 2))
    return seen.first


class Seen(L.Callback):
    """The first samples of this rank."""

    def __init__(self) -> None:
        self.first: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.first = self.first or batch["index"].tolist()


def lightning_ddp() -> list[float]:
    """Trains with Lightning's `DDPStrategy`, in which each rank logs the loss of its own samples."""
    start()
    warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")
    module, losses = Classifier(), Losses()
    strategy = DDPStrategy(process_group_backend="gloo")
    options: dict[str, Any] = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP, "max_epochs": 1}
    options |= {"use_distributed_sampler": False, "callbacks": [losses]}
    trainer, _ = make_trainer(None, strategy=strategy, devices=2, **options)
    trainer.fit(module, _in_order(2))
    return [_mean(loss) for loss in losses.found]


class Parallelized(Classifier):
    """As users of `ModelParallelStrategy` parallelize blocks."""

    device_mesh: Any

    def configure_model(self) -> None:
        """Divides the blocks."""
        plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in self.blocks:
            parallelize_module(block, self.device_mesh["tensor_parallel"], plan)


def lightning_model_parallel() -> list[float]:
    """Trains with Lightning's `ModelParallelStrategy`, two ranks of tensor parallelism; without clipping."""
    start()
    module, losses = Parallelized(), Losses()
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    options: dict[str, Any] = {"accumulate_grad_batches": ACCUMULATE, "max_epochs": 1, "callbacks": [losses]}
    trainer, _ = make_trainer(None, strategy=strategy, devices=2, use_distributed_sampler=False, **options)
    trainer.fit(module, _in_order(1))
    return losses.found


def _model() -> torch.nn.Module:
    start()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Classifier()


def torch_ddp() -> list[float]:
    """Trains in a loop with torch's DDP."""
    model = DDP(_model())
    # as `with model.no_sync()` for the batches without an update
    return _losses_of(model, lambda updates: setattr(model, "require_backward_grad_sync", updates))


def torch_fsdp() -> list[float]:
    """Trains in a loop with torch's `fully_shard`."""
    model: Any = _model()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _losses_of(model)


def _losses_of(model: Any, begin: Callable[[bool], None] = lambda updates: None) -> list[float]:
    """Trains in a loop; the loss of each update. `begin` is told before each batch whether an update follows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found, own = [], 0.0
    for index, batch in enumerate(_in_order(2), 1):
        updates = index % ACCUMULATE == 0
        begin(updates)
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        (loss / ACCUMULATE).backward()
        own += loss.item() / ACCUMULATE
        if updates:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            found.append(_mean(own))
            own = 0.0
    return found


def accelerate_loop(folder: str) -> list[float]:
    """Trains in a loop with accelerate, saves its state in the middle and loads it again."""
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports] -- optional

    start()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    assert accelerator.num_processes == 2
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Numbers(SAMPLES), batch_size=BATCH // 2)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found, own = [], []
    for batch in loader:
        with accelerator.accumulate(prepared):
            loss = F.cross_entropy(prepared(batch["x"]), batch["y"])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        losses: Any = accelerator.gather_for_metrics(loss.detach())
        own.append(float(losses.mean()))
        if accelerator.sync_gradients:
            found.append(sum(own) / ACCUMULATE)
            own = []
            if len(found) == 2:
                accelerator.save_state(folder)
                accelerator.wait_for_everyone()
                accelerator.load_state(folder)
    assert accelerator.unwrap_model(prepared) is model
    accelerator.free_memory()
    return found


def deepspeed_loop(stage: int) -> list[float]:
    """Trains in a loop with DeepSpeed's ZeRO."""
    import deepspeed  # pyright: ignore[reportMissingImports] -- optional

    model = _model()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "gradient_accumulation_steps": ACCUMULATE,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    found, own = [], 0.0
    for index, batch in enumerate(_in_order(2), 1):
        loss = F.cross_entropy(engine(batch["x"]), batch["y"])
        engine.backward(loss)
        engine.step()
        own += loss.item() / ACCUMULATE
        if index % ACCUMULATE == 0:
            found.append(_mean(own))
            own = 0.0
    return found
