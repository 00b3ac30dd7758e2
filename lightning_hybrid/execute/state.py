"""Whole weights and optimizer states out of a partitioned module, and back into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_hybrid.execute.runner import Runner


def full_state_dict(runner: Runner) -> dict[str, Any]:
    """All weights and persistent buffers on the CPU of rank 0, under the user's names; `{}` elsewhere. Collective."""
    runner.partition.reshard()
    parameters = runner.partition.parameters
    with parameters.all_visible():
        shown = runner.root.state_dict()
    wholes: dict[str, Tensor | None] = {}
    for name in parameters.names:
        wholes[name] = _to_rank_zero(runner, name, parameters[name])
    for name, buffer in runner.root.named_buffers():
        if name in shown:
            wholes[name] = _collect(
                runner, runner.partition.buffer_rank(name), buffer.detach(), buffer.shape, buffer.dtype
            )
    if dist.get_rank() != 0:
        return {}
    return {key: wholes.get(parameters.first_names.get(key, key), value) for key, value in shown.items()}


def load_full_state_dict(runner: Runner, state: Mapping[str, Any], strict: bool) -> None:
    """Each rank takes its part of the whole weights in `state`.

    Raises:
        RuntimeError: If `strict` and the names differ, as `nn.Module.load_state_dict` does.
    """
    runner.partition.reshard()
    parameters = runner.partition.parameters
    with parameters.all_visible():
        expected = set(runner.root.state_dict())
    missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected)
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(runner.root).__name__}: missing keys {missing}, unexpected keys "
            f"{unexpected}."
        )
    buffers = dict(runner.root.named_buffers())
    with torch.no_grad():
        for name, parameter in parameters.held().items():
            if name in state:
                _copy_part(runner, name, parameter, state[name])
        for name, buffer in buffers.items():
            if name in state:
                buffer.copy_(state[name])


def full_optimizer_state(runner: Runner, optimizer: Optimizer) -> dict[str, Any]:
    """The state dict that the optimizer would have in one process, on rank 0; `{}` elsewhere. Collective."""
    optimizer = _plain(optimizer)
    names = runner.optimizer_names[id(optimizer)]
    parameters = runner.partition.parameters
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(name for group in names for name in group):
        entry = optimizer.state.get(parameters[name], {})  # empty for a ghost, which no optimizer has
        state[index] = _gather_entry(runner, name, entry)
    if dist.get_rank() != 0:
        return {}
    groups, start = [], 0
    for group, members in zip(optimizer.param_groups, names, strict=True):
        indices = list(range(start, start + len(members)))
        start += len(members)
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": indices})
    return {"state": {i: s for i, s in state.items() if s}, "param_groups": groups}


def load_full_optimizer_state(runner: Runner, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Each rank takes its part of a one-process optimizer state dict."""
    optimizer = _plain(optimizer)
    parameters = runner.partition.parameters
    order = [name for group in runner.optimizer_names[id(optimizer)] for name in group]
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({k: v for k, v in saved_group.items() if k != "params"})
    held = parameters.held()
    for index, entry in saved["state"].items():
        name = order[int(index)]
        if name not in held:
            continue
        parameter = held[name]
        own: dict[str, Any] = {}
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0:
                own[key] = torch.zeros_like(parameter, dtype=value.dtype).detach()
                _copy_part(runner, name, own[key], value)
            else:
                own[key] = value.clone() if isinstance(value, Tensor) else value
        optimizer.state[parameter] = own


def _plain(optimizer: Any) -> Optimizer:
    return getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps optimizers


def _gather_entry(runner: Runner, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizer state of one parameter, whole, on rank 0."""
    source = runner.partition.plan.ranks_of(name)[0]
    parameter = runner.partition.parameters[name]
    kinds = {
        k: (v.dtype, v.shape == parameter.shape and v.ndim > 0) if isinstance(v, Tensor) else None
        for k, v in entry.items()
    }
    box = [(kinds, {k: v for k, v in entry.items() if kinds[k] is None or not kinds[k][1]})]  # type: ignore[index]
    dist.broadcast_object_list(box, _leader(runner, source))
    kinds, small = box[0]
    whole = dict(small)
    for key, kind in kinds.items():
        if kind is not None and kind[1]:
            whole[key] = _to_rank_zero(runner, name, entry.get(key), kind[0])
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in whole.items()} if dist.get_rank() == 0 else {}


def _leader(runner: Runner, pipeline_rank: int) -> int:
    """The global rank of the first replica's first tensor rank on a pipeline rank."""
    return int(runner.mesh.device_mesh.mesh[pipeline_rank, 0, 0, 0])


def _to_rank_zero(runner: Runner, name: str, tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """The whole of a tensor that is laid out like parameter `name`, on rank 0."""
    source = runner.partition.plan.ranks_of(name)[0]
    parameter = runner.partition.parameters[name]
    if runner.mesh.rank("pp") != source:
        return _collect(runner, source, None, parameter.shape, dtype or parameter.dtype)
    whole = runner.partition.gathered(name, (parameter if tensor is None else tensor).detach())
    return _collect(runner, source, whole, whole.shape, whole.dtype)


def _collect(runner: Runner, source: int, tensor: Tensor | None, shape: Any, dtype: torch.dtype) -> Tensor | None:
    """Moves a tensor from the leader of a pipeline rank to the CPU of rank 0."""
    leader, rank = _leader(runner, source), dist.get_rank()
    if rank == 0 and leader != 0:
        tensor = torch.empty(shape, dtype=dtype, device=runner.device)
        dist.recv(tensor, leader)
    elif rank == leader != 0 and tensor is not None:
        dist.send(tensor.to(runner.device).contiguous(), 0)
    return tensor.detach().cpu().clone() if rank == 0 and tensor is not None else None


def _copy_part(runner: Runner, name: str, target: Tensor, whole: Tensor) -> None:
    """Copies this rank's part of `whole` into `target`, a tensor laid out like parameter `name`."""
    partition, layout = runner.partition, runner.mesh.layout
    part = whole.detach()
    if partition.tensor is not None:
        part = partition.tensor.shard(name, part).to_local()
    own = target.detach()
    if layout.fsdp > 1 and name not in partition.whole:
        pieces = torch.chunk(part, layout.fsdp)  # fully_shard splits dim 0 like torch.chunk
        index = runner.mesh.rank("fsdp")
        part = pieces[index] if index < len(pieces) else part[:0]
    local = own.to_local() if isinstance(own, DTensor) else own
    local.copy_(part)
