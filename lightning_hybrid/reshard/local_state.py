"""Shards of weights, buffers and optimizer state by name, moved from one partition to another in resharding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import fresh_optimizers, plain_optimizer
from lightning_hybrid.checkpoint.state import optimizer_state
from lightning_hybrid.collectives import gather_objects, to_local
from lightning_hybrid.compat.averaging import LocalWeights
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.placement import index_at, writes
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.tensor_index import Index, whole_index


class Key(NamedTuple):
    """Name of a tensor of the model or of its optimizers."""

    group: str
    """`weights`, `buffers`, `averages/<number>` or `optimizers/<number>/<entry>`."""
    name: str
    """Name of the parameter or buffer (for averages and optimizer state: of its parameter)."""


@dataclass
class LocalState:
    """The global list of tensors to move, and this rank's parts of them."""

    parts: dict[Key, Tensor] = field(default_factory=dict)
    """This rank's parts of tensors."""
    dtypes: dict[Key, torch.dtype] = field(default_factory=dict)
    """Dtypes of all tensors of which any rank has a part, in the same order on all ranks."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the whole parameters and buffers, by name."""
    entries: dict[tuple[int, str, str], Any] = field(default_factory=dict)
    """State of optimizers that is not laid out like a parameter (step counts): by optimizer, entry and parameter."""
    names: list[list[list[str]]] = field(default_factory=list)
    """Names of the parameters of each group of each optimizer."""

    @classmethod
    def of(cls, engine: Engine, optimizers: Sequence[Optimizer], averages: Sequence[LocalWeights]) -> LocalState:
        """Returns the state with references to this rank's parts, which are not copied. Collective."""
        engine.partition.reshard()
        found = cls()
        found._collect_module(engine, averages)
        for number, optimizer in enumerate(optimizers):
            found._collect_optimizer(engine, number, optimizer)
        found._share()
        return found

    def _put(self, group: str, name: str, tensor: Tensor) -> None:
        self.parts[Key(group, name)] = to_local(tensor.detach())

    def _collect_module(self, engine: Engine, averages: Sequence[LocalWeights]) -> None:
        partition = engine.partition
        self.shapes = {n: tuple(partition.shape_of(n)) for n in partition.parameters.names}
        local = partition.parameters.local()
        for name, parameter in local.items():
            self._put("weights", name, parameter)
        for name, buffer in engine.root.named_buffers():
            self.shapes[name] = tuple(buffer.shape)
            self._put("buffers", name, buffer)
        for number, average in enumerate(averages):
            for name, value in average.named_values().items():
                first = partition.parameters.first_names.get(name, name)
                if first in local:
                    self._put(f"averages/{number}", first, value)

    def _collect_optimizer(self, engine: Engine, number: int, optimizer: Optimizer) -> None:
        saved, local = optimizer_state(engine, optimizer), engine.partition.parameters.local()
        self.names.append([group["params"] for group in saved["param_groups"]])
        for name, entry in saved["state"].items():
            for kind, value in entry.items():
                if isinstance(value, Tensor) and value.ndim and value.shape == local[name].shape:
                    self._put(f"optimizers/{number}/{kind}", name, value)
                elif writes(engine.partition, name, whole=True):
                    self.entries[number, kind, name] = value.cpu() if isinstance(value, Tensor) else value

    def _share(self) -> None:
        """Gathers the dtypes and entries of all ranks. Collective."""
        for dtypes, entries in gather_objects(({key: part.dtype for key, part in self.parts.items()}, self.entries)):
            self.dtypes.update(dtypes)
            self.entries.update(entries)
        self.dtypes = dict(sorted(self.dtypes.items()))


def places_of(partition: Partition, local_state: LocalState) -> Callable[[Key], tuple[Index | None, ...]]:
    """Returns a function that gives the part of a tensor on each rank under `partition`; None for ranks without it."""
    known: dict[tuple[bool, str], tuple[Index | None, ...]] = {}
    plan, places = partition.plan, partition.mesh.places

    def find(key: Key) -> tuple[Index | None, ...]:
        buffer = key.group == "buffers"
        if (buffer, key.name) not in known:
            if buffer:
                whole, rank = whole_index(local_state.shapes[key.name]), partition.buffer_rank(key.name)
                known[buffer, key.name] = tuple(whole if place.pp == rank else None for place in places)
            else:
                ranks = plan.ranks_of(key.name)
                shape = local_state.shapes[key.name]
                known[buffer, key.name] = tuple(
                    index_at(partition, key.name, shape, place) if place.pp in ranks else None for place in places
                )
        return known[buffer, key.name]

    return find


def share_whole(partition: Partition) -> None:
    """Gathers the names of the weights that `fsdp` has left whole on any rank. Collective."""
    partition.whole.update(*gather_objects(sorted(partition.whole)))


class Target:
    """New partition that resharding fills.

    Args:
        engine: The new engine.
        optimizers: The optimizers, whose state is replaced.
        averages: Averages of weights in the new partition.
        local_state: The state to move.
    """

    def __init__(
        self,
        engine: Engine,
        optimizers: Sequence[Optimizer],
        averages: Sequence[LocalWeights],
        local_state: LocalState,
    ) -> None:
        self._engine, self._averages, self._local_state = engine, averages, local_state
        self._optimizers = [plain_optimizer(o) for o in optimizers]
        self._local = engine.partition.parameters.local()
        self._buffers = dict(engine.root.named_buffers())

    def renew_optimizers(self) -> None:
        """Points the optimizers' groups at this rank's new parameters, and restores state that is not resharded."""
        self._place_new_parameters()
        for number, optimizer in enumerate(self._optimizers):
            names = self._local_state.names[number]
            self._engine.optimizers.names[id(optimizer)] = names
            for group, members in zip(optimizer.param_groups, names, strict=True):
                group["params"] = [self._local[n] for n in members if n in self._local]
            optimizer.state.clear()
        for (number, kind, name), value in self._local_state.entries.items():
            if name in self._local:
                parameter = self._local[name]
                own = value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
                own = own.clone() if isinstance(own, Tensor) else own
                self._optimizers[number].state[parameter][kind] = own

    def _place_new_parameters(self) -> None:
        """Adds parameters that are new in the module to the groups in which `configure_optimizers` puts them."""
        parameters, local_state = self._engine.partition.parameters, self._local_state
        new = {n for n in parameters.names if n not in local_state.shapes}
        if not new:
            return
        with parameters.all_visible():
            names = {id(parameters.visible(n)): n for n in parameters.names}
            made = [
                [[names.get(id(p), "") for p in g["params"]] for g in o.param_groups]
                for o in fresh_optimizers(self._engine.root)[0]
            ]
        present = [len(groups) for groups in local_state.names]
        if [len(groups) for groups in made] != present:
            raise PartitionError(
                f"`configure_optimizers` gives {[len(g) for g in made]} groups with the module's new weights, and the "
                f"optimizers have {present}, so the groups cannot be matched."
            )
        for groups, of_fresh in zip(local_state.names, made, strict=True):
            for group, members in zip(groups, of_fresh, strict=True):
                group += [n for n in members if n in new]

    def tensor(self, key: Key) -> Tensor | None:
        """Returns this rank's part of a tensor, to be filled; None if this rank holds no part."""
        kind, _, rest = key.group.partition("/")
        if kind == "buffers":
            return self._buffers[key.name]
        if key.name not in self._local:
            return None
        if kind == "weights":
            return to_local(self._local[key.name].detach())
        if kind == "averages":
            return to_local(self._averages[int(rest)].named_values()[key.name])
        number, _, entry = rest.partition("/")
        parameter = self._local[key.name]
        own = torch.empty_like(parameter, dtype=self._local_state.dtypes[key]).detach()
        self._optimizers[int(number)].state[parameter][entry] = own
        return to_local(own)
