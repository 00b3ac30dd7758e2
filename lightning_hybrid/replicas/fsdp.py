"""Sharded replicas: applies `fully_shard` to every block and to `StepModule`, never to the LightningModule itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.mesh import Mesh


def shard_replicas(
    root: nn.Module,
    step_module: nn.Module | None,
    blocks: Iterable[str],
    experts: Iterable[nn.Module],
    parameters: Parameters,
    local: Collection[str],
    written: Collection[str],
    mesh: Mesh,
    make_real: Callable[[Collection[str]], None] | None,
) -> tuple[set[str], list[tuple[nn.Module, Callable]]]:
    """Shards the parameters of this rank over the `fsdp` axis, with replicas over `dp`.

    Weights outside the experts are also sharded over `ep`; experts are divided over `ep` already.

    Args:
        root: The LightningModule.
        step_module: The module around `root`, which shards the parameters outside the blocks; None: they stay whole.
        blocks: Names of the blocks on this rank.
        experts: The modules of experts divided over `ep`.
        parameters: The parameters of `root`.
        local: Names of the parameters that this rank holds.
        written: Names of parameters that the step writes, which stay whole: a write to gathered weights would be lost.
        mesh: The device mesh.
        make_real: Makes named parameters real that are still ghosts; called just before each block is sharded, so that
            at most one block is whole at a time.

    Returns:
        Names of parameters that stay whole (as scalars and empty ones, which cannot be sharded), and modules with their
        new `forward`.
    """
    overrides: list[tuple[nn.Module, Callable]] = []
    sharded: set[str] = set()
    # without a step module each block is a root, whose weights would stay gathered where no backward pass follows
    reshard = True if step_module is None else None
    whole = {name for name in local if not parameters[name].ndim * parameters[name].numel() or name in written}
    if make_real is not None:
        make_real(whole)
    ignored: set[Any] = {parameters[name] for name in whole}
    for module in experts:
        own = {name for name in local if any(slot.module is module for slot in parameters.slots[name])}
        sharded |= own
        if make_real is not None:
            make_real(own)
        fully_shard(module, mesh=mesh.sharding(experts=True), reshard_after_forward=reshard)
        # experts receive tokens of all ranks of `ep`, so their gradients are sums over `ep`
        module.set_gradient_divide_factor(float(mesh.layout.replicas))  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator] -- gloo cannot average
    for block in blocks:
        inside = parameters.inside(block) & set(local)
        alone = all(slot.name.startswith(f"{block}.") for name in inside for slot in parameters.slots[name])
        if inside - whole and alone:  # a weight shared with another block is gathered with the step module
            if make_real is not None:
                make_real(inside)
            others = _of_other_dtypes(inside - whole, parameters)
            whole |= others
            ignored |= {parameters[name] for name in others}
            sharded |= inside - whole
            module = root.get_submodule(block)
            fully_shard(
                module, mesh=mesh.sharding(experts=False), reshard_after_forward=reshard, ignored_params=ignored
            )
            overrides.append((module, _call_instead_of_forward(module)))
    if make_real is not None:
        make_real(local)
    if step_module is None:
        return set(local) - sharded, overrides
    others = _of_other_dtypes(set(local) - whole - sharded, parameters)
    whole |= others
    ignored |= {parameters[name] for name in others}
    if len(whole) < len(local):
        fully_shard(step_module, mesh=mesh.sharding(experts=False), ignored_params=ignored)
    return whole, overrides


def _of_other_dtypes(names: Collection[str], parameters: Parameters) -> set[str]:
    """Returns the trained parameters whose dtype is not that of most: `fully_shard` reduces one dtype per module."""
    sizes: Counter[torch.dtype] = Counter()
    trained = [name for name in names if parameters.requires_grad[name]]
    for name in trained:
        sizes[parameters[name].dtype] += parameters[name].numel()
    most = max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)), default=None)
    return {name for name in trained if parameters[name].dtype != most}


def _call_instead_of_forward(block: nn.Module) -> Callable:
    """Makes `block.forward(...)`, which some models call, run `block(...)` with its hooks."""
    forward, called = block.forward, []

    def inside(_: nn.Module, args: tuple) -> None:
        called.append(True)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if called:
            called.pop()
            return forward(*args, **kwargs)
        return block(*args, **kwargs)

    block.register_forward_pre_hook(inside)
    block.__dict__["forward"] = guarded
    return guarded
