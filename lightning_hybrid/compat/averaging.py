"""Averages of weights (Lightning's `StochasticWeightAveraging` and `WeightAveraging`) of a partitioned module.

The callbacks copy the module before it is partitioned. Averages are elementwise, so each rank can keep the averages of
its own parts: the copies of the callbacks are replaced by those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from lightning_hybrid._lightning_private import (
    average_of,
    average_options,
    averaged_once_per_epoch,
    averaged_per_step,
    forget_schedulers_before_averaging,
    set_average,
)
from lightning_hybrid.checkpoint.state import load_state_dict, read
from lightning_hybrid.collectives import to_local
from lightning_hybrid.engine.build import ENGINE
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.placement import index_of
from lightning_hybrid.patching import patched
from lightning_hybrid.spec.errors import PartitionError

_DOT = "\N{MIDDLE DOT}"
"""Replacement of dots in names: a registered parameter's name must not contain dots."""


def use_local_averages(engine: Engine) -> None:
    """Makes the averages of callbacks keep this rank's parts only; saving them is collective."""
    root, partition, trainer = engine.root, engine.partition, engine.run.trainer
    for callback in averaged_once_per_epoch(trainer):
        local = LocalWeights(root, partition, on_load=lambda c=callback: forget_schedulers_before_averaging(c, trainer))
        local.saves_whole = True  # in the callback's own state, of which rank 0's is saved
        set_average(callback, local)
    for callback in averaged_per_step(trainer):
        average, options = average_of(callback), average_options(callback)
        if not isinstance(average, LocalAverage):
            set_average(callback, LocalAverage(root, partition, average.use_buffers, options))


def local_copies(engine: Engine) -> AbstractContextManager:
    """Returns a context in which copies of the module hold, and `load_state_dict` loads, this rank's parts."""
    return patched(
        engine.root,
        __deepcopy__=lambda memo: LocalWeights(engine.root, engine.partition),
        load_state_dict=_LoadsWholeWeights(engine),
    )


def keep_loading_whole_weights(engine: Engine) -> None:
    """Lets the module load whole weights after the run, too, if ranks hold parts; keeps a method of the user."""
    present = engine.root.__dict__.get("load_state_dict")
    if engine.divides_weights and (present is None or isinstance(present, _LoadsWholeWeights)):
        engine.keep(load_state_dict=_LoadsWholeWeights(engine))


class _LoadsWholeWeights:
    """The `load_state_dict` of a partitioned module: each rank loads its part of whole weights."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads this rank's part of the whole weights in `state_dict`."""
        if self._engine.root.__dict__.get(ENGINE) is not self._engine:  # no longer partitioned by this engine
            return nn.Module.load_state_dict(self._engine.root, state_dict, strict, assign)
        whole = _WholeOnDemand(state_dict, self._engine.full_tensor)
        with self._engine.divided():
            return load_state_dict(self._engine, whole, strict)


class _WholeOnDemand(Mapping[str, Any]):
    """Weights by name, of which divided ones, as hooks see and keep them, are gathered one at a time."""

    def __init__(self, state: Mapping[str, Any], full_tensor: Callable[[Tensor], Tensor]) -> None:
        self._state, self._full_tensor = state, full_tensor
        self._last: tuple[str, Any] = ("", None)

    def __getitem__(self, name: str) -> Any:
        value = self._state[name]
        if not isinstance(value, DTensor):
            return value
        if self._last[0] != name:
            self._last = name, self._full_tensor(value.detach())
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def local_averages(trainer: pl.Trainer) -> list[LocalWeights]:
    """Returns this rank's parts of the averages that callbacks keep of a partitioned module."""
    per_step: list[Any] = [average_of(c) for c in averaged_per_step(trainer)]
    found: list[Any] = [average_of(c) for c in averaged_once_per_epoch(trainer)]
    return found + [a.module for a in per_step if isinstance(a, LocalAverage)]


def renew_averages(trainer: pl.Trainer, averages: list[LocalWeights]) -> None:
    """Replaces the callbacks' `local_averages` by `averages`, in the same order."""
    left = iter(averages)
    for callback in averaged_once_per_epoch(trainer):
        old, new = average_of(callback), next(left)
        new.saves_whole, new.on_load = old.saves_whole, old.on_load
        set_average(callback, new)
    for callback in averaged_per_step(trainer):
        if isinstance(average := average_of(callback), LocalAverage):
            average.module = next(left)


class LocalWeights(nn.Module):
    """Copies of the parameters and buffers of a partitioned module that this rank holds, in the module's order.

    Args:
        root: The LightningModule.
        partition: The partition of `root`.
        on_load: Called when a state is loaded.
    """

    _partition: Partition
    on_load: Callable[[], None] | None

    def __init__(self, root: nn.Module, partition: Partition, on_load: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.__dict__.update(_partition=partition, on_load=on_load)
        self.saves_whole = False
        partition.reshard()
        for name, parameter in root.named_parameters():
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            self.register_parameter(name.replace(".", _DOT), copy)
        for name, buffer in root.named_buffers():
            self.register_buffer(name.replace(".", _DOT), buffer.detach().clone())

    def __deepcopy__(self, memo: dict) -> LocalWeights:
        return LocalWeights(self, self._partition, self.on_load)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises, because this module has weights but no computation.

        Raises:
            PartitionError: Always.
        """
        raise PartitionError(
            f"A copy of a module under `layout='{self._partition.plan.layout}'` has the weights that one rank holds "
            "and can't be run. Run the module itself, or copy it before the Trainer gets it."
        )

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Returns the parameters, and reshards the partitioned module, whose parameters are read at the same time."""
        self._partition.reshard()
        return super().parameters(recurse)

    def named_values(self) -> dict[str, Tensor]:
        """Returns parameters and buffers under the module's names."""
        values = [*self.named_parameters(), *self.named_buffers()]
        return {name.replace(_DOT, "."): value.detach() for name, value in values}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns this rank's parts; if `saves_whole`, collectively, all weights whole on the CPU of rank 0."""
        values, partition = self.named_values(), self._partition
        if not self.saves_whole:
            return dict(values)
        wholes: dict[str, Tensor | None] = {}
        for name in partition.parameters.names:
            whole = partition.whole_of(name, values.get(name))
            wholes[name] = whole.cpu() if dist.get_rank() == 0 else None
        return {**{n: v for n, v in values.items() if n not in wholes}, **wholes}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads this rank's part of each value, which is whole or a `SavedTensor`.

        Raises:
            RuntimeError: If `strict`, and `state_dict` lacks a name.
        """
        if self.on_load is not None:
            self.on_load()
        partition = self._partition
        with torch.no_grad():
            for name, value in self.named_values().items():
                first = partition.parameters.first_names.get(name)
                if name in state_dict:
                    index = index_of(partition, first) if first is not None else None
                    to_local(value).copy_(read(state_dict[name], index))
                elif strict:
                    raise RuntimeError(f"The saved average has no `{name}`. It belongs to another module.")


class LocalAverage(AveragedModel):
    """The average of the weights that this rank holds.

    Args:
        root: The LightningModule.
        partition: The partition of `root`.
        use_buffers: True if buffers are averaged, too.
        options: Further arguments of `AveragedModel`.
    """

    def __init__(self, root: nn.Module, partition: Partition, use_buffers: bool, options: dict[str, Any]) -> None:
        super().__init__(LocalWeights(root, partition), use_buffers=use_buffers, **options)

    def update_parameters(self, model: nn.Module) -> None:
        """Adds the current weights of `model` to the average."""
        local: nn.Module = self.module  # type: ignore[assignment]
        parts = _Parts(local)  # reads the average first, which reshards the model
        self._modules["module"] = parts
        try:
            super().update_parameters(_Parts(model))
        finally:
            self._modules["module"] = local

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns the state of an `AveragedModel` with this rank's parts."""
        values = self.module.state_dict()  # type: ignore[operator]
        return {"n_averaged": self.n_averaged, **{f"module.{n}": v for n, v in values.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads this rank's parts."""
        self.n_averaged.copy_(state_dict["n_averaged"])
        values = {n.removeprefix("module."): v for n, v in state_dict.items() if n.startswith("module.")}
        self.module.load_state_dict(values, strict)  # type: ignore[operator]


class _Parts(nn.Module):
    """Local parts of a module's parameters and buffers, in the same memory: torch averages no mix with DTensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for i, parameter in enumerate(module.parameters()):
            self.register_parameter(str(i), nn.Parameter(to_local(parameter.detach()), requires_grad=False))
        for i, buffer in enumerate(module.buffers()):
            self.register_buffer(f"buffer{i}", buffer)
