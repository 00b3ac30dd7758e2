"""Memory probes at the start of training, for the tests of them; these run on every rank."""

from __future__ import annotations

import ctypes
import gc
import random
import re
import resource
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from lightning_hybrid.adapt.memory import MemoryFit
from lightning_hybrid.callbacks import AdaptiveBatchSize
from lightning_hybrid.dataloader.peek import sample_batch
from lightning_hybrid.tuning.memory_probe.probe import MemoryProbe, ProbeError, ProbeResult
from tests.distributed.experts.expert_jobs import Mixture
from tests.distributed.jobs import WIDTH, Classifier, Numbers, quiet, trainer_for

M_MMAP_THRESHOLD = -3
"""Parameter of glibc's mallopt: from this size on, an allocation is a mapping of its own."""


class Faults:
    """What goes wrong in a training step on this rank."""

    def __init__(self, limits: list[int] | None = None, fail_on: int | None = None, fail_in: str = "forward") -> None:
        self.limits, self.fail_on, self.fail_in = limits, fail_on, fail_in

    def raise_in(self, place: str, size: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank == self.fail_on and place == self.fail_in and size > 16:
            raise KeyError(f"injected for {size} samples")
        # under memory pressure it is the pass that needs more that fails: by rank, either of the two
        if self.limits is not None and size > self.limits[rank] and place == ("forward", "backward")[rank % 2]:
            raise torch.OutOfMemoryError(f"injected for {size} samples")


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, faults: Faults) -> torch.Tensor:
        ctx.faults, ctx.size = faults, len(x)
        faults.raise_in("forward", len(x))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.faults.raise_in("backward", ctx.size)
        return gradients[0], None


class WatchedBlock(nn.Module):
    """A residual block with dropout and faults in the middle; it keeps running statistics and what it was called with.

    Not under `pp`, which would run such a step on one microbatch.
    """

    mean: torch.Tensor

    def __init__(self, width: int, faults: Faults, dropout: float, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout, self.faults = nn.Dropout(dropout), faults
        self.register_buffer("mean", torch.zeros(width), persistent=False)
        self.calls: list[int] = []

    def forward(self, x):
        if self.keeps:
            self.calls.append(len(x))
        inner = _Watched.apply(torch.tanh(self.up(x)), self.faults)
        if self.training and self.keeps:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x + self.down(self.dropout(inner))


class Probed(Classifier):
    """The classifier with such blocks; it draws random numbers of all kinds in a step and keeps what it has seen."""

    def __init__(
        self, faults: Faults | None = None, dropout: float = 0.1, width: int = WIDTH, keeps: bool = True
    ) -> None:
        super().__init__(width=width, optimizer="adamw")
        self.keeps = keeps
        self.blocks = nn.ModuleList(WatchedBlock(width, faults or Faults(), dropout, keeps) for _ in range(4))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"x": batch["x"] + 0.01 * torch.rand(1) + 0.01 * random.random()}

    def training_step(self, batch, batch_idx):
        drawn = random.random() + float(np.random.rand())
        if self.keeps:
            self.seen.append(drawn)
        return super().training_step(batch, batch_idx)


class ProbedMixture(Mixture):
    """The classifier with experts, with a fault at its beginning."""

    def __init__(self, faults: Faults | None = None) -> None:
        super().__init__(adamw=True)
        self.faults = faults or Faults()

    def training_step(self, batch, batch_idx):
        for place in ("forward", "backward"):
            self.faults.raise_in(place, len(batch["x"]))
        return super().training_step(batch, batch_idx)


def module_for(layout: str, faults: Faults | None = None) -> Any:
    L.seed_everything(7, verbose=False)
    return ProbedMixture(faults) if "ep" in layout else Probed(faults, keeps="pp" not in layout)


class ProbeAtStart(L.Callback):
    """Probes when training starts, and notes whether that has changed anything."""

    def __init__(self, ladder: list[int], repeats: int = 1, **options: Any) -> None:
        self.ladder, self.repeats, self.options = ladder, repeats, options
        self.results: list[ProbeResult] = []
        self.changed: list[str] = []
        self.errors: list[str] = []

    def on_train_start(self, trainer, pl_module):
        strategy: Any = trainer.strategy
        batch, _ = sample_batch(trainer.train_dataloader, training=True)
        with strategy.engine.outside_hooks():  # as callbacks of this package run
            for _ in range(self.repeats):
                before = snapshot(trainer, pl_module)
                probe = MemoryProbe(strategy.engine.runner, strategy.optimizers, batch, **self.options)
                try:
                    self.results.append(probe.find(self.ladder))
                except ProbeError as error:
                    self.errors.append(str(error))
                after = snapshot(trainer, pl_module)
                self.changed += [key for key in before | after if not same(before.get(key), after.get(key))]


class OfUser(AdaptiveBatchSize):
    """A class of the user: its hooks see weights as those of the user do."""


def adapt_by_class_of_user(layout: str, limits: list[int]) -> int | None:
    """The microbatch size that a run finds whose callback is derived from that of this package."""
    quiet()
    module = module_for(layout, Faults(limits))
    adaptive = OfUser(memory="device", statistics=None)
    trainer, replicas = trainer_for(layout, callbacks=[adaptive])
    trainer.fit(module, DataLoader(Numbers(256), batch_size=64 // replicas))
    return adaptive._microbatch.samples


class Record(L.Callback):
    """Losses and this rank's gradients of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        strategy: Any = trainer.strategy
        local = strategy.engine.partition.parameters.local()
        self.gradients.append({n: to_local(p.grad).clone() for n, p in local.items() if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))  # type: ignore[index] -- a dict here, in automatic optimization


def to_local(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach()


def snapshot(trainer: Any, module: Any) -> dict[str, Any]:
    """What a probe must not change, on this rank."""
    runner, found = trainer.strategy.engine.runner, {}
    for name, parameter in runner.partition.parameters.local().items():
        found[f"weight {name}"] = to_local(parameter).clone()
        found[f"gradient {name}"] = None if parameter.grad is None else to_local(parameter.grad).clone()
        found[f"identity {name}"] = id(parameter)
    found |= {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}
    for i, optimizer in enumerate(trainer.optimizers):
        found[f"state {i}"] = [len(s) for s in optimizer.state.values()]
        found[f"options {i}"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        found[f"attributes {i}"] = sorted(vars(optimizer))
    for name, child in module.named_modules():
        plain = {k: v for k, v in vars(child).items() if isinstance(v, int | float | str | bool | type(None))}
        found[f"attributes {name}"] = plain | {k: list(v) for k, v in vars(child).items() if type(v) is list}
    found["torch"], found["python"] = torch.get_rng_state(), random.getstate()
    found["numpy"] = [str(part) for part in np.random.get_state()]
    found["streams"] = runner.rng._key
    found["metrics"] = {k: float(v) for k, v in trainer.logged_metrics.items()}
    found["progress"] = str(trainer.fit_loop.epoch_loop.state_dict())
    if runner.pipeline is not None:
        found["shapes"] = len(runner.pipeline.prepared)
    if runner.partition.experts is not None:
        found["loads"] = sorted(runner.partition.experts.loads())
    return found


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def probe(
    layout: str,
    ladder: list[int],
    *,
    faults: dict[str, Any] | None = None,
    repeats: int = 1,
    microbatches: int = 1,
    accumulate: int = 1,
    budget_bytes: list[int] | None = None,
    schedule: str = "1F1B",
) -> dict[str, Any]:
    """Trains three steps after probes: what these found and whether they changed anything, and what the steps gave."""
    quiet()
    module = module_for(layout, Faults(**faults) if faults else None)
    options: dict[str, Any] = {"microbatches": microbatches, "accumulates": accumulate > 1}
    if budget_bytes is not None:
        options["budget_bytes"] = budget_bytes[dist.get_rank()] if dist.is_initialized() else budget_bytes[0]
    at_start = ProbeAtStart(ladder, repeats, **options)
    record = Record()
    fit(layout, module, [at_start, record] if ladder else [record], accumulate, schedule)
    return {
        "results": at_start.results,
        "errors": at_start.errors,
        "changed": at_start.changed,
        "losses": record.losses,
        "gradients": record.gradients,
        "seen": getattr(module, "seen", []),
        "metrics": {k: float(v) for k, v in module.trainer.callback_metrics.items()},
    }


def fit(layout: str, module: Any, callbacks: list[Any], accumulate: int = 1, schedule: str = "1F1B") -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate} if accumulate > 1 else {}
    strategy_options: dict[str, Any] = {"schedule": schedule} if "pp" in layout else {}
    trainer, replicas = trainer_for(layout, callbacks=callbacks, strategy_options=strategy_options, **options)
    trainer.fit(module, DataLoader(Numbers(48 * accumulate), batch_size=16 // replicas, shuffle=True))


# ---- time-outs


class Relayout(L.Callback):
    """Changes the layout after the first step, and notes the time-outs of all process groups."""

    def __init__(self, layout: str) -> None:
        self._layout = layout
        self.timeouts: dict[str, timedelta] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            strategy: Any = trainer.strategy
            strategy.relayout(self._layout)
            backends = {g.group_name: g._get_backend(torch.device("cpu")) for g in dist.distributed_c10d._world.pg_map}
            self.timeouts = {name: backend.options._timeout for name, backend in backends.items()}


def timeouts_after_relayout(before: str, after: str, timeout: timedelta) -> dict[str, timedelta]:
    """The time-outs of all process groups after a change of the layout in a run with `timeout`."""
    quiet()
    relayout = Relayout(after)
    trainer, replicas = trainer_for(before, callbacks=[relayout], strategy_options={"timeout": timeout})
    trainer.fit(module_for(before), DataLoader(Numbers(48), batch_size=16 // replicas))
    return relayout.timeouts


# ---- real memory


class Wide(Probed):
    """Wide enough that tensors are mappings of their own, which go back to the system at once."""

    def __init__(self, layout: str) -> None:
        super().__init__(width=256, dropout=0.0, keeps="pp" not in layout)


def status(key: str) -> int:
    """A line of `/proc/self/status`, in bytes."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


class ProbeUnderLimit(ProbeAtStart):
    """One rank has so much address space beyond what it has taken."""

    def __init__(self, ladder: list[int], limited_rank: int, free_bytes: int, **options: Any) -> None:
        super().__init__(ladder, **options)
        self.limited_rank, self.free_bytes = limited_rank, free_bytes

    def on_train_start(self, trainer, pl_module):
        with self._limited() if dist.get_rank() == self.limited_rank else _unlimited():
            super().on_train_start(trainer, pl_module)

    @contextmanager
    def _limited(self):
        gc.collect()  # what it would free later is not free now
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + self.free_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _unlimited():
    yield


def prepare_memory() -> None:
    quiet()
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)
    L.seed_everything(7, verbose=False)


def probe_under_limit(layout: str, ladder: list[int], limited_rank: int, free_bytes: int, **options: Any) -> Any:
    """A probe under a limit of the address space, and the losses of the steps after it."""
    prepare_memory()
    at_start, record = ProbeUnderLimit(ladder, limited_rank, free_bytes, **options), Record()
    fit(layout, Wide(layout), [at_start, record])
    return at_start.results[0], record.losses, at_start.changed


class Rows(Numbers):
    """Gives a batch at once: thousands of samples as Python objects would take as much memory as the step."""

    def __getitems__(self, indices: list[int]) -> Any:
        index = torch.tensor(indices)
        return {"x": self.x[index], "y": self.y[index], "index": index}


def as_it_is(batch: Any) -> Any:
    return batch


class ResidentPeak(L.Callback):
    """How much resident memory has grown since training started, at the highest."""

    before = 0

    def on_train_start(self, trainer, pl_module):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before = status("VmRSS")

    @property
    def growth(self) -> int:
        return status("VmHWM") - self.before


def resident_growth(layout: str, budget_bytes: int, microbatches: int) -> tuple[ProbeResult, int, int]:
    """Probes, trains with what was found; the result, the bytes of this rank's weights, how much memory was taken."""
    prepare_memory()
    module = Wide(layout)
    at_start = ProbeAtStart(list(range(64, 16385, 64)), budget_bytes=budget_bytes, microbatches=microbatches)
    fit(layout, module, [at_start])  # also imports and allocates what is needed once
    result = at_start.results[0]
    module, peak = Wide(layout), ResidentPeak()
    # verification also runs the step of one process, which takes the memory of the whole batch
    strategy_options: dict[str, Any] = {"verify": "off"} | ({"microbatches": microbatches} if "pp" in layout else {})
    trainer, replicas = trainer_for(layout, callbacks=[peak], strategy_options=strategy_options)
    size = result.size * microbatches
    trainer.fit(module, DataLoader(Rows(3 * size * replicas), batch_size=size, collate_fn=as_it_is))
    strategy: Any = trainer.strategy
    with strategy.engine.divided():
        held = sum(to_local(p).nbytes for p in strategy.engine.partition.parameters.local().values())
    return result, held, peak.growth


def predicted(fit: MemoryFit | None, size: int) -> int:
    assert fit is not None
    return fit.predict(size)
