"""Sharded replicas: `fully_shard` on every block and on our own step module, never on the LightningModule itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.mesh import Mesh


def shard_replicas(
    root: nn.Module,
    step_module: nn.Module | None,
    blocks: Iterable[str],
    experts: Iterable[nn.Module],
    parameters: Parameters,
    local: Collection[str],
    mesh: Mesh,
    make_real: Callable[[Collection[str]], None] | None,
) -> tuple[set[str], list[tuple[nn.Module, Callable]]]:
    """Shards the held parameters over the `fsdp` axis, with replicas over `dp`.

    Weights outside the experts are sharded over `ep` too; the experts, which `ep` has divided already, are not.

    Args:
        root: The LightningModule.
        step_module: The module around it, which takes what is in no block; None: that stays whole.
        blocks: Names of the held blocks.
        experts: The modules of experts that `ep` has divided.
        parameters: The parameters of `root`.
        local: Names of those that this rank holds.
        mesh: The device mesh.
        make_real: Makes the parameters it is given real, where they are still ghosts; called just before they are
            sharded, so that no more than a block is ever whole.

    Returns:
        Names of parameters that stay whole, as scalars do, which cannot be split; and modules with the `forward` that
        they were given.
    """
    overrides: list[tuple[nn.Module, Callable]] = []
    scalars = {name for name in local if parameters[name].ndim == 0}
    if make_real is not None:
        make_real(scalars)
    ignored: set[Any] = {parameters[name] for name in scalars}
    for module in experts:
        if make_real is not None:
            make_real({name for name in local if any(slot.module is module for slot in parameters.slots[name])})
        fully_shard(module, mesh=mesh.sharding(experts=True))
        # a rank's experts have had the tokens of all ranks of `ep`: their gradients are sums over these
        module.set_gradient_divide_factor(float(mesh.layout.replicas))  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator] -- gloo can't divide while it sums
    for block in blocks:
        inside = parameters.inside(block) & set(local)
        alone = all(slot.name.startswith(f"{block}.") for name in inside for slot in parameters.slots[name])
        if inside - scalars and alone:  # a weight shared with another block is gathered with the step module
            if make_real is not None:
                make_real(inside)
            module = root.get_submodule(block)
            fully_shard(module, mesh=mesh.sharding(experts=False), ignored_params=ignored)
            overrides.append((module, _call_instead_of_forward(module)))
    if make_real is not None:
        make_real(local)
    if step_module is None:
        return {name for name in local if not isinstance(parameters[name], DTensor)}, overrides
    if len(scalars) < len(local):
        fully_shard(step_module, mesh=mesh.sharding(experts=False), ignored_params=ignored)
    return scalars, overrides


def _call_instead_of_forward(block: nn.Module) -> Callable:
    """Turns `block.forward(...)`, as some models call their blocks, into `block(...)`, which runs the hooks."""
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
