"""Runs whose layout changes while they train; these run on every rank."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.reshard.relayout import RelayoutResult
from lightning_hybrid.spec.errors import PartitionError
from tests.distributed.experts.expert_jobs import Counting, Mixture
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights

MODULES = {"Classifier": Classifier, "Mixture": Mixture}
LAYOUTS = ("dp4", "fsdp4", "dp2-fsdp2", "tp2-pp2", "fsdp2-tp2", "pp4", "fsdp2-pp2", "dp2-pp2", "dp2-tp2")
EXPERT_LAYOUTS = ("ep4", "dp2-ep2", "fsdp2-ep2", "ep2-pp2", "ep2-tp2")


def random_layouts(seed: int, steps: int, experts: bool = False) -> dict[int, str]:
    """Layouts by the step after which they begin, at least two steps apart."""
    rng = random.Random(seed)
    choices = LAYOUTS + (EXPERT_LAYOUTS if experts else ())
    return {step: rng.choice(choices) for step in sorted(rng.sample(range(0, steps, 2), 6))}


def whole_state(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """Weights, buffers and everything that optimizers keep of them, whole, on every rank."""
    strategy: Any = trainer.strategy
    with strategy.engine.divided():
        return _whole_state(strategy)


def _whole_state(strategy: Any) -> dict[str, torch.Tensor]:
    partition, found = strategy.engine.partition, {}
    for name in partition.parameters.names:
        found[f"weights/{name}"] = partition.whole_parameter(name)
    for number, optimizer in enumerate(strategy.optimizers):
        local = partition.parameters.local()
        for name in partition.parameters.names:
            entry = optimizer.state.get(local[name], {}) if name in local else {}
            kinds = gather_objects(sorted(k for k, v in entry.items() if v.ndim and v.shape == local[name].shape))
            for kind in sorted(set().union(*kinds)):
                found[f"{number}/{kind}/{name}"] = partition.whole_of(name, entry.get(kind))
            steps = gather_objects(float(entry["step"]) if "step" in entry else None)
            assert len({s for s in steps if s is not None}) < 2
            found[f"{number}/step/{name}"] = torch.tensor([s for s in steps if s is not None][:1])
    return {k: v.clone() for k, v in found.items()}


def layout_of(trainer: L.Trainer) -> str:
    strategy: Any = trainer.strategy
    return str(strategy.layout)


class Switches(L.Callback):
    """Changes the layout after given steps, and compares everything before and after."""

    def __init__(self, layouts: Mapping[int, str], compare: bool = True, **options: Any) -> None:
        self._layouts, self._compare, self._options = dict(layouts), compare, options
        self.moved: list[RelayoutResult] = []
        self.changed: list[str] = []
        self.least: list[int] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.objects: set[tuple[int, ...]] = set()

    def on_train_start(self, trainer, pl_module):
        self._change(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["loss_step"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.objects.add((id(pl_module), *map(id, trainer.optimizers)))
        if not trainer.fit_loop._should_accumulate():
            self._change(trainer)

    def _change(self, trainer: L.Trainer) -> None:
        strategy: Any = trainer.strategy
        layout = self._layouts.pop(trainer.global_step, None)
        if layout is None:
            return
        before = whole_state(trainer) if self._compare else {}
        self.moved.append(strategy.relayout(layout, **self._options))
        after = whole_state(trainer) if self._compare else {}
        self.changed += sorted(before.keys() ^ after.keys())
        self.changed += [k for k in before.keys() & after.keys() if not torch.equal(before[k], after[k])]


def train(
    layout: str | None,
    layouts: Mapping[int, str] | None = None,
    *,
    kind: str = "Classifier",
    batch: int = 8,
    samples: int = 88,
    steps: int = 30,
    shuffle: bool = True,
    compare: bool = True,
    loader_options: dict[str, Any] | None = None,
    relayout_options: dict[str, Any] | None = None,
    callbacks: list[L.Callback] | None = None,
    module_options: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Losses, learning rates and weights of a run; and what its changes of layout were."""
    quiet()
    L.seed_everything(7, verbose=False)
    module: Any = MODULES[kind](**({"optimizer": "adamw"} if kind == "Classifier" else {}) | (module_options or {}))
    switches = Switches(layouts or {}, compare, **(relayout_options or {}))
    trainer, replicas = trainer_for(
        layout, callbacks=[switches, *(callbacks or [])], **{"max_epochs": -1, "max_steps": steps, **options}
    )
    data = Numbers(samples)
    trainer.fit(
        module,
        DataLoader(data, batch_size=batch // replicas, shuffle=shuffle, **(loader_options or {})),
        DataLoader(data, batch_size=4),
        ckpt_path=ckpt_path,
        weights_only=False,
    )
    return {
        "losses": switches.losses,
        "rates": switches.rates,
        "weights": weights(trainer, module),
        "moved": [(str(m.before), str(m.after), m.sent_bytes, m.seconds) for m in switches.moved],
        "changed": switches.changed,
        "objects": len(switches.objects),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "layout": layout_of(trainer),
    }


def averaged(layouts: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """The weights of a run that ends with an average over its steps."""
    average = EMAWeightAveraging(decay=0.8)
    return train("dp4", layouts, compare=False, steps=20, callbacks=[average])["weights"]


def saved(folder: str, layouts: Mapping[int, str]) -> tuple[list[float], list[str]]:
    """The losses of a run that saves, and the names of its checkpoints."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    found = train("dp4", layouts, compare=False, steps=20, callbacks=[saver], enable_checkpointing=True)
    return found["losses"], sorted(p.name for p in Path(folder).iterdir())


def copied(layout: str, hosts: Sequence[Sequence[int]], **options: Any) -> dict[str, Any]:
    """A run in which the ranks compute these experts of every block, from the first step on; and the tokens of each."""
    named = {f"blocks.{i}.experts": hosts for i in range(4)}
    module_options = {"experts": "Counting", "adamw": True, "favorite": True, **options.pop("module_options", {})}
    counter = Came()
    found = train(
        layout,
        {0: layout},
        kind="Mixture",
        steps=6,
        relayout_options={"expert_hosts": named},
        module_options=module_options,
        callbacks=[counter],
        **options,
    )
    return {**found, "came": counter.came}


class Came(L.Callback):
    """Tokens that have come to the experts of this rank in training."""

    def __init__(self) -> None:
        self.came = 0

    def on_train_start(self, trainer, pl_module):
        self._experts = [m for m in pl_module.modules() if isinstance(m, Counting)]
        for module in self._experts:
            module.came = 0

    def on_train_end(self, trainer, pl_module):
        self.came = sum(module.came for module in self._experts)


class Tries(L.Callback):
    """Asks for a layout that is refused, once, and goes on."""

    def __init__(self, layout: str, in_window: bool, differs: bool) -> None:
        self._layout, self._in_window, self._differs = layout, in_window, differs
        self.error = ""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.error or batch_idx < 1 or trainer.fit_loop._should_accumulate() != self._in_window:
            return
        strategy: Any = trainer.strategy
        layout = "fsdp4" if self._differs and trainer.global_rank == 1 else self._layout
        try:
            strategy.relayout(layout)
        except PartitionError as error:
            self.error = str(error)


class OwnBatches(BatchSampler):
    """A batch sampler of the user's."""


class Batches(IterableDataset):
    """A stream of samples."""

    def __iter__(self):
        return (Numbers(64)[i] for i in range(64))


def refused(
    layout: str,
    to: str,
    *,
    batch: int = 8,
    loader: str = "",
    in_window: bool = False,
    differs: bool = False,
    manual: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What is said of a layout that cannot be, and where training is afterwards."""
    quiet()
    L.seed_everything(7, verbose=False)
    tries = Tries(to, in_window, differs)
    module: Any = Mixture(manual=True) if manual else Classifier()
    trainer, replicas = trainer_for(layout, callbacks=[tries], max_steps=4, max_epochs=-1, **options)
    data = Numbers(batch * 12)
    if loader == "stream":
        given: Any = DataLoader(Batches(), batch_size=2)
    elif loader == "batches":
        given = DataLoader(data, batch_sampler=OwnBatches(range(64), 2, drop_last=False))
    else:
        given = DataLoader(data, batch_size=batch // replicas)
    trainer.fit(module, given)
    return {"error": tries.error, "layout": layout_of(trainer), "steps": trainer.global_step}
