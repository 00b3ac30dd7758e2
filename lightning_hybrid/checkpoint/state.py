"""Converts the state of a partitioned module and its optimizers to the content of a checkpoint, and back.

When saving, `state_dict` and `optimizer_states` of a rank hold that rank's shards, under the user's names. When
loading, they hold `SavedTensor`s, of which each rank reads its shard, or whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import plain_optimizer
from lightning_hybrid.checkpoint.content import Content, Part
from lightning_hybrid.checkpoint.reader import SavedTensor
from lightning_hybrid.checkpoint.whole_values import whole_values
from lightning_hybrid.collectives import gather_objects, to_local
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.mesh import AXES
from lightning_hybrid.parallelize.placement import index_of, selected, writes
from lightning_hybrid.spec.errors import CheckpointError
from lightning_hybrid.spec.tensor_index import Index, shape_of, whole_index

EXTRA_STATE = "_extra_state"
"""The name under which `nn.Module.state_dict` puts what `get_extra_state` returns."""
_SHOWN_NAMES = 5
"""Names of weights in an error."""

# ---- saving


def state_dict(engine: Engine) -> dict[str, Any]:
    """Returns this rank's shards of all weights, and the persistent buffers, under the user's names."""
    engine.partition.reshard()
    with engine.partition.parameters.all_visible():
        shown = engine.root.state_dict()
    found = {name: value for name, value in shown.items() if not isinstance(value, Ghost)}
    if engine.diloco is not None:  # the last averaged weights
        first = engine.partition.parameters.first_names
        for name in found:
            agreed = engine.diloco.agreed(first.get(name, name))
            found[name] = found[name] if agreed is None else agreed
    return found


def optimizer_state(engine: Engine, optimizer: Optimizer) -> dict[str, Any]:
    """Returns the optimizer's state of this rank's parameters, by name; groups list the names of all parameters."""
    optimizer = plain_optimizer(optimizer)
    names = engine.optimizers.names_in(optimizer)
    parameters = engine.partition.parameters
    entries = {}
    for name in (name for group in names for name in group):
        entry = optimizer.state.get(parameters[name])  # none for a ghost
        if entry:
            entries[name] = {k: _laid_out(v, parameters[name]) for k, v in entry.items()}
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": list(members)}
        for group, members in zip(optimizer.param_groups, names, strict=True)
    ]
    return {"state": entries, "param_groups": groups}


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """Returns state of the parameter's shape unchanged, and gathers state of another shape."""
    if isinstance(value, DTensor) and value.shape != parameter.shape:
        return value.full_tensor()
    return value


def content_of(engine: Engine, checkpoint: Mapping[str, Any]) -> Content:
    """Returns the part of Lightning's checkpoint dict that this rank writes.

    Raises:
        CheckpointError: If a tensor of the model's state has neither the whole shape nor that of this rank's shard.
    """
    known = set(_shown_names(engine))
    first = dist.get_rank() == 0
    content = Content(document={})
    document: dict[str, Any] = {}
    for key, value in checkpoint.items():
        if key == "optimizer_states":
            for i, saved in enumerate(value):
                _add_optimizer(engine, content, f"{key}/{i}", saved)
            document[key] = [{k: v for k, v in saved.items() if k != "state"} for saved in value]
        elif key == "state_dict" or (isinstance(value, Mapping) and value and known.issuperset(value)):
            _add_group(engine, content, key, value)
            document[key] = {}
        else:
            document[key] = value
    document["names"] = _shown_names(engine)
    document["aliases"] = {n: f for n, f in engine.partition.parameters.first_names.items() if n != f}
    document |= whole_values(engine, {k: v for k, v in document.items() if k not in PER_RANK})
    kept = document if first else {k: v for k, v in document.items() if k in PER_RANK}
    return Content(parts=content.parts, values=content.values, document=kept)


PER_RANK = ("loops", "streams", "local_steps")
"""Keys of the checkpoint dict that every rank saves; rank 0 saves all others."""


def _shown_names(engine: Engine) -> list[str]:
    with engine.partition.parameters.all_visible():
        return list(engine.root.state_dict())


def _add_group(engine: Engine, content: Content, group: str, mapping: Mapping[str, Any]) -> None:
    partition = engine.partition
    local = partition.parameters.local()
    for name, value in mapping.items():
        first = partition.parameters.first_names.get(name, name)
        if first != name and first in mapping:
            continue  # the same weight under another name
        if first in local and isinstance(value, Tensor):
            part = _part(engine, group, first, value)
            if part is not None:
                content.parts.append(part)
        elif _leads(engine, partition.buffer_rank(name)):
            if isinstance(value, Tensor):
                content.parts.append(_whole_part(group, first, value))
            else:
                content.values.setdefault(group, {})[name] = value


def _add_optimizer(engine: Engine, content: Content, prefix: str, saved: Mapping[str, Any]) -> None:
    partition = engine.partition
    for name, entry in saved["state"].items():
        for key, value in entry.items():
            group = f"{prefix}/{key}"
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape == partition.parameters[name].shape:
                part = _part(engine, group, name, value)
                if part is not None:
                    content.parts.append(part)
            elif writes(partition, name, whole=True):
                if isinstance(value, Tensor):
                    content.parts.append(_whole_part(group, name, value))
                else:
                    content.values.setdefault(group, {})[name] = value


def _part(engine: Engine, group: str, name: str, tensor: Tensor) -> Part | None:
    """Returns this rank's shard of a tensor laid out like parameter `name`; None if another rank writes it."""
    partition = engine.partition
    shape, index = tuple(partition.shape_of(name)), index_of(partition, name)
    own = to_local(tensor.detach())
    if tuple(own.shape) == shape_of(index):
        if not writes(partition, name):
            return None
    elif tuple(own.shape) == shape:
        index = whole_index(shape)
        if not writes(partition, name, whole=True):
            return None
    else:
        raise CheckpointError(
            f"`{group}['{name}']` has shape {tuple(own.shape)}: neither that of the weight, {shape}, nor that of this "
            f"rank's shard of it, {shape_of(index)}."
        )
    return Part(group=group, name=name, shape=shape, index=index, tensor=own)


def _whole_part(group: str, name: str, tensor: Tensor) -> Part:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return Part(
        group=group, name=name, shape=tuple(tensor.shape), index=whole_index(tensor.shape), tensor=tensor.detach()
    )


def _leads(engine: Engine, pipeline_rank: int) -> bool:
    """Returns True if this is the first rank of the pipeline rank `pipeline_rank`."""
    places = {axis: engine.mesh.rank(axis) for axis in AXES}
    return places == {**dict.fromkeys(AXES, 0), "pp": pipeline_rank}


# ---- loading


def load_state_dict(engine: Engine, state: Mapping[str, Any], strict: bool) -> None:
    """Loads this rank's shards of the weights in `state`, which are whole tensors or `SavedTensor`s. Collective.

    Raises:
        RuntimeError: If `strict` and names differ, or a shape differs, like `nn.Module.load_state_dict`.
    """
    partition = engine.partition
    partition.reshard()
    expected = _shown_names(engine)
    local, buffers = partition.parameters.local(), dict(engine.root.named_buffers())
    if strict:
        needed = [n for n in expected if n in buffers or partition.parameters.first_names.get(n) in local]
        _check_names(engine, set(needed) - set(state), set(state) - set(expected))
    with torch.no_grad():
        for name in expected:
            first = partition.parameters.first_names.get(name, name)
            if name not in state:
                continue
            if first in local:
                _check_shape(engine, name, state[name], partition.shape_of(first))
                to_local(local[first].detach()).copy_(read(state[name], index_of(partition, first)))
            elif name in buffers:
                _check_shape(engine, name, state[name], buffers[name].shape)
                buffers[name].copy_(read(state[name]))
            elif name.endswith(EXTRA_STATE):
                owner = name.removesuffix(EXTRA_STATE).removesuffix(".")
                engine.root.get_submodule(owner).set_extra_state(read(state[name]))


def _check_names(engine: Engine, missing: set[str], unexpected: set[str]) -> None:
    """Raises the same error on all ranks if names are missing or unexpected on any rank. Collective."""
    found = gather_objects((missing, unexpected))
    missing, unexpected = set().union(*(m for m, _ in found)), set().union(*(u for _, u in found))
    if missing or unexpected:
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(engine.root).__name__}: missing keys {_first(missing)}, "
            f"unexpected keys {_first(unexpected)}. Give the module the arguments that the saved one had, or use "
            "another checkpoint."
        )


def _first(names: set[str]) -> str:
    """Returns the first names as a list in text, and the number of the others."""
    others = len(names) - _SHOWN_NAMES
    shown = str(sorted(names)[:_SHOWN_NAMES])
    return f"{shown[:-1]}, and {others} more]" if others > 0 else shown


def _check_shape(engine: Engine, name: str, saved: Any, shape: torch.Size) -> None:
    if tuple(saved.shape) != tuple(shape):
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(engine.root).__name__}: size mismatch for {name}: "
            f"{tuple(saved.shape)} in the checkpoint, {tuple(shape)} in the model."
        )


def load_optimizer_state(engine: Engine, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Loads this rank's shards of an optimizer's state, saved by name or, by a single process, by number."""
    optimizer = plain_optimizer(optimizer)
    names = engine.optimizers.names_in(optimizer)
    order = [name for group in names for name in group]
    if len(names) != len(saved["param_groups"]):
        raise CheckpointError(
            f"The checkpoint has {len(saved['param_groups'])} parameter groups of {type(optimizer).__name__}, the "
            f"optimizer has {len(names)}."
        )
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({k: v for k, v in saved_group.items() if k != "params"})
    local = engine.partition.parameters.local()
    for key, entry in saved["state"].items():
        name = order[int(key)] if isinstance(key, int) else key
        if name in local:
            optimizer.state[local[name]] = dict(_own_entry(engine, name, local[name], entry))


def own_optimizer_states(engine: Engine) -> list[dict[str, dict[str, Any]]]:
    """Returns this rank's own state of each optimizer, by name, for DiLoCo replicas."""
    names = {id(p): n for n, p in engine.partition.parameters.local().items()}
    found = []
    for optimizer in map(plain_optimizer, engine.root.trainer.optimizers):
        entries = {names[id(p)]: entry for p, entry in optimizer.state.items() if id(p) in names}
        found.append(
            {n: {k: to_local(v) if isinstance(v, Tensor) else v for k, v in e.items()} for n, e in entries.items()}
        )
    return found


def load_own_optimizer_states(engine: Engine, saved: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Copies states of `own_optimizer_states` into optimizers with loaded state of the same form."""
    local = engine.partition.parameters.local()
    for optimizer, entries in zip(map(plain_optimizer, engine.root.trainer.optimizers), saved, strict=True):
        for name, entry in entries.items():
            state = optimizer.state[local[name]]
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    to_local(state[key]).copy_(value)
                else:
                    state[key] = value


def _own_entry(engine: Engine, name: str, parameter: Tensor, entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        shape = tuple(engine.partition.shape_of(name))
        if isinstance(value, Tensor | SavedTensor) and tuple(value.shape) == shape and value.shape:
            own = torch.zeros_like(parameter, dtype=value.dtype).detach()
            to_local(own).copy_(read(value, index_of(engine.partition, name)))
            yield key, own
        elif isinstance(value, Tensor | SavedTensor):
            whole = read(value).clone()
            # step counts stay on the device where the optimizer keeps them: the CPU, unless saved from another device
            yield key, whole.to(parameter.device) if whole.ndim else whole
        else:
            yield key, value


def read(value: Any, index: Index | None = None) -> Any:
    """Returns the shard `index` (None: all) of a tensor or a `SavedTensor`, and any other value unchanged."""
    if isinstance(value, SavedTensor):
        return value.read(index)
    return value if index is None or not isinstance(value, Tensor) else selected(value, index)


# ---- gathered weights


def full_state_dict(engine: Engine) -> dict[str, Any]:
    """Gathers all weights and persistent buffers on the CPU of rank 0, under the user's names. Collective.

    Returns:
        The state dict on rank 0, `{}` on all other ranks.
    """
    engine.partition.reshard()
    parameters = engine.partition.parameters
    with parameters.all_visible():
        shown = engine.root.state_dict()
    wholes: dict[str, Tensor | None] = {name: _parameter_to_rank_zero(engine, name) for name in parameters.names}
    for name, buffer in engine.root.named_buffers():
        if name in shown:
            wholes[name] = _collect(
                engine, engine.partition.buffer_rank(name), buffer.detach(), buffer.shape, buffer.dtype
            )
    if dist.get_rank() != 0:
        return {}
    return {key: wholes.get(parameters.first_names.get(key, key), value) for key, value in shown.items()}


def _parameter_to_rank_zero(engine: Engine, name: str) -> Tensor | None:
    source = engine.partition.plan.ranks_of(name)[0]
    parameter = engine.partition.parameters[name]
    if engine.mesh.rank("pp") != source:
        return _collect(engine, source, None, parameter.shape, parameter.dtype)
    whole = engine.partition.gathered(name, parameter.detach())
    return _collect(engine, source, whole, whole.shape, whole.dtype)


def _collect(engine: Engine, source: int, tensor: Tensor | None, shape: Any, dtype: torch.dtype) -> Tensor | None:
    """Moves a tensor from the first rank of a pipeline rank to the CPU of rank 0."""
    leader, rank = int(engine.mesh.device_mesh.mesh[source].flatten()[0]), dist.get_rank()
    if rank == 0 and leader != 0:
        tensor = torch.empty(shape, dtype=dtype, device=engine.device)
        dist.recv(tensor, leader)
    elif rank == leader != 0 and tensor is not None:
        dist.send(tensor.to(engine.device).contiguous(), 0)
    return tensor.detach().cpu().clone() if rank == 0 and tensor is not None else None
