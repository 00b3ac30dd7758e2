"""Proposes tensor-parallel regions of a unit from its probed data flow.

A **region** is opened by colwise linears (output channels divided), closed by rowwise linears (input channels divided,
output summed over the ranks), and between them every rank computes its own channels with no communication. Proposals
are verified numerically in `verify`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from lightning_hybrid.spec.tensor_plan import Path, ShardedParameter, SlicedArgument, UnitPlan
from lightning_hybrid.tensor.numbers import Numbers
from lightning_hybrid.tensor.probe import Leaf, Probe, Reach, linear_dims, merge


class Rejection(Exception):
    """A linear cannot close a region; the message is the reason."""


@dataclass
class Constraints:
    """Restrictions set by the caller; names are relative to the unit."""

    replicated: Collection[str] = ()
    """Linears whose weights must stay replicated."""
    used_elsewhere: Collection[str] = ()
    """Parameters shared with, or used by, modules outside the unit; they stay whole."""
    shared_modules: Collection[str] = ()
    """Modules that other blocks contain too, or that run inside a transform; no region uses them."""
    unused_results: Collection[int] = ()
    """Tensors of the unit's result, by position, that nothing consumes."""


@dataclass
class Region:
    """A proposed region; the fields are those of `UnitPlan`."""

    rowwise: list[str]
    colwise: dict[str, tuple[int, ...] | None]
    shared_outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    selected_outputs: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    parameters: dict[str, ShardedParameter] = field(default_factory=dict)
    buffers: dict[str, ShardedParameter] = field(default_factory=dict)
    partial: list[str] = field(default_factory=list)
    slices: list[SlicedArgument] = field(default_factory=list)
    shared_arguments: list[Path] = field(default_factory=list)

    def plan(self, numbers: Numbers, ranks: int) -> UnitPlan:
        """Returns the region as a `UnitPlan`, with the weights of its linears."""
        parameters = dict(self.parameters)
        attributes: dict[str, dict[str, int]] = {}
        for name, order in self.colwise.items():
            module = numbers.module.get_submodule(name)
            dims = linear_dims(module)
            if dims is None:
                continue
            for key, value in _weight_and_bias(numbers, name).items():
                dim = dims[0] if key == "weight" else 0
                parameters[f"{name}.{key}"] = ShardedParameter(dim=dim, size=value.shape[dim], order=order)
            if "nf" in module.__dict__:  # transformers' Conv1D reshapes its output to `nf` channels
                attributes[name] = {"nf": module.__dict__["nf"] // ranks}
        for name in self.rowwise:
            dims = linear_dims(numbers.module.get_submodule(name))
            if dims is not None:
                weight = numbers.parameters[f"{name}.weight"]
                parameters[f"{name}.weight"] = ShardedParameter(dim=dims[1], size=weight.shape[dims[1]])
        return UnitPlan(
            rowwise=tuple(self.rowwise),
            colwise=tuple(self.colwise),
            regions=((*self.rowwise, *self.colwise, *self.selected_outputs),),
            shared_outputs=self.shared_outputs,
            selected_outputs=self.selected_outputs,
            parameters=parameters,
            buffers=self.buffers,
            attributes=attributes,
            partial=tuple(self.partial),
            slices=tuple(self.slices),
            shared_arguments=tuple(self.shared_arguments),
        )


def _weight_and_bias(numbers: Numbers, linear: str) -> dict[str, torch.Tensor]:
    names = {key: f"{linear}.{key}" if linear else key for key in ("weight", "bias")}
    return {key: numbers.parameters[name] for key, name in names.items() if name in numbers.parameters}


def divide(masks: list[torch.Tensor]) -> ShardedParameter | None:
    """Divides one dim into `masks[rank]`; returns None if the masks are not disjoint, equal in size and covering."""
    size = masks[0].numel()
    count = torch.stack(masks).sum(0)
    if size % len(masks) or not bool((count == 1).all()) or any(int(m.sum()) != size // len(masks) for m in masks):
        return None
    order = tuple(int(i) for mask in masks for i in mask.nonzero().flatten())
    return ShardedParameter(dim=0, size=size, order=None if order == tuple(range(size)) else order)


def divide_any_dim(masks: list[torch.Tensor]) -> ShardedParameter | None:
    """Divides a tensor along the first dim for which `divide` succeeds."""
    for dim in range(masks[0].ndim):
        others = [d for d in range(masks[0].ndim) if d != dim]
        along = [m.amax(others) if others else m for m in masks]
        if masks[0].shape[dim] >= len(masks) and (sharded := divide(along)) is not None:
            return ShardedParameter(dim=dim, size=sharded.size, order=sharded.order)
    return None


def propose(row: str, probe: Probe, numbers: Numbers, ranks: int, constraints: Constraints) -> Region:
    """Returns the region that `row` closes, with all other linears that must belong to the region.

    Raises:
        Rejection: If there is no such region.
    """
    rows = [row]
    while True:
        for name in rows:
            _check_row(name, probe, numbers, ranks, constraints)
        region = _classify(rows, probe, numbers, ranks, constraints)
        divided = {Leaf("linear", n) for n in region.colwise} | {Leaf("parameter", n) for n in region.parameters}
        more = [n for n in probe.linears if n not in rows and divided & probe.whole(n).keys()]
        if not more:
            break
        rows = [n for n in probe.linears if n in rows or n in more]
    both = [n for n in rows if n in region.colwise]
    if both:
        raise Rejection(f"`{both[0]}` would have to be colwise and rowwise at once")
    leaking = divided & probe.outside.keys()
    if leaking:
        raise Rejection(f"`{min(str(leaf.name) for leaf in leaking)}` is also part of what the unit returns")
    _check_partial_gradients(region, probe, numbers, ranks)
    return region


def _check_row(name: str, probe: Probe, numbers: Numbers, ranks: int, constraints: Constraints) -> None:
    width = probe.trials[0].inputs[name][0].shape[-1]
    if width % ranks:
        raise Rejection(f"its {width} input channels are not divisible by {ranks}")
    if name in constraints.replicated:
        raise Rejection("`tensor_plan` keeps it replicated")
    if name in constraints.shared_modules or _parameter_name(name, "weight") in constraints.used_elsewhere:
        raise Rejection("its weight is also used outside its block, or written by the step")
    if _parameter_name(name, "bias") in constraints.used_elsewhere:
        raise Rejection("its bias is also used outside its block, or written by the step")
    for leaf in probe.whole(name):
        if leaf.kind == "opaque":
            raise Rejection(f"its input depends on the output of `{leaf.name}` directly")
        derived = leaf.kind == "argument" and leaf.name in numbers.derived
        if derived and _reached_outside(leaf, [name], probe) is not None:
            raise Rejection("its input depends on an input of the block that is also used outside the region")


def _owner(leaf: Leaf) -> str | None:
    """Returns the module of a leaf; None for an argument."""
    if leaf.kind == "argument":
        return None
    return str(leaf.name) if leaf.kind in ("linear", "opaque") else str(leaf.name).rpartition(".")[0]


def _parameter_name(linear: str, key: str) -> str:
    return f"{linear}.{key}" if linear else key


def _classify(rows: list[str], probe: Probe, numbers: Numbers, ranks: int, constraints: Constraints) -> Region:
    """Divides every linear, parameter, buffer and argument that the inputs of `rows` depend on."""
    parts = [merge([probe.parts(row, ranks)[rank] for row in rows]) for rank in range(ranks)]
    region = Region(rowwise=rows, colwise={})
    for leaf in sorted(merge(parts), key=str):
        if _owner(leaf) in constraints.shared_modules:
            raise Rejection(f"its input depends on `{leaf.name}`, which runs outside this block, too")
        masks = _masks(leaf, parts)
        if leaf.kind == "linear":
            _classify_linear(str(leaf.name), masks, region, constraints)
        elif isinstance(leaf.name, tuple):
            _classify_argument(leaf.name, divide_any_dim(masks), region, numbers, ranks)
        else:
            whole = leaf.name in constraints.used_elsewhere
            _classify_tensor(leaf, None if whole else divide_any_dim(masks), region)
    if not region.colwise and not region.selected_outputs:
        upstream = sorted({str(leaf.name) for part in parts for leaf in part if leaf.kind == "linear"})
        raise Rejection(
            f"its input does not fall into {ranks} parts that depend on different output channels of linears"
            + (f" (it depends on {', '.join(f'`{n}`' for n in upstream)})" if upstream else "")
        )
    region.colwise = {n: region.colwise[n] for n in probe.linears if n in region.colwise}
    return region


def _masks(leaf: Leaf, parts: list[Reach]) -> list[torch.Tensor]:
    some = next(part[leaf] for part in parts if leaf in part)
    return [part.get(leaf, torch.zeros_like(some)) for part in parts]


def _classify_linear(name: str, masks: list[torch.Tensor], region: Region, constraints: Constraints) -> None:
    whole = name in constraints.replicated or _parameter_name(name, "weight") in constraints.used_elsewhere
    sharded = None if whole else divide(masks)
    channels = tuple(tuple(int(i) for i in mask.nonzero().flatten()) for mask in masks)
    if sharded is not None:
        region.colwise[name] = sharded.order
    elif len(set(channels)) > 1 and len({len(part) for part in channels}) == 1:
        region.selected_outputs[name] = channels
    else:
        region.shared_outputs[name] = tuple(sorted({i for part in channels for i in part}))


def _classify_argument(
    path: Path, sharded: ShardedParameter | None, region: Region, numbers: Numbers, ranks: int
) -> None:
    if sharded is not None:
        region.slices.append(SlicedArgument(path=path, dim=sharded.dim, owners=_owners(sharded, ranks)))
    elif path in numbers.derived:
        region.shared_arguments.append(path)


def _classify_tensor(leaf: Leaf, sharded: ShardedParameter | None, region: Region) -> None:
    """Adds a parameter or buffer to `region`."""
    name = str(leaf.name)
    if leaf.kind == "buffer":
        region.buffers |= {} if sharded is None else {name: sharded}
    elif sharded is not None:
        region.parameters[name] = sharded
    else:
        region.partial.append(name)


def _owners(sharded: ShardedParameter, ranks: int) -> tuple[int, ...]:
    """Returns the rank that uses each index, for the shortest period of the dim."""
    owner = [0] * sharded.size
    for rank in range(ranks):
        for index in sharded.part(rank, ranks):
            owner[index] = rank
    for period in range(ranks, sharded.size + 1):
        if sharded.size % period == 0 and all(owner[i] == owner[i % period] for i in range(sharded.size)):
            return tuple(owner[:period])
    return tuple(owner)


def _reached_outside(leaf: Leaf, rows: list[str], probe: Probe) -> torch.Tensor | None:
    """Returns the part of `leaf` that reaches anything other than the inputs of `rows`; None if nothing else."""
    reaches = [probe.whole(name) for name in probe.linears if name not in rows] + [probe.outside]
    return merge(reaches).get(leaf)


def _check_partial_gradients(region: Region, probe: Probe, numbers: Numbers, ranks: int) -> None:
    """Checks that replicated tensors used inside the region are not used outside it.

    Their gradients are summed over the ranks, which is wrong for a use outside the region.

    Raises:
        Rejection: If one is used in both places.
    """
    for name, channels in region.shared_outputs.items():
        outside = _reached_outside(Leaf("linear", name), region.rowwise, probe)
        if outside is not None and bool(outside[list(channels)].any()):
            raise Rejection(f"the output of `{name}` is used by all ranks, inside and outside the region")
    for name in region.selected_outputs:
        if _reached_outside(Leaf("linear", name), region.rowwise, probe) is not None:
            raise Rejection(f"the output of `{name}` is used by all ranks, inside and outside the region")
    for name in region.partial:
        if _reached_outside(Leaf("parameter", name), region.rowwise, probe) is not None:
            raise Rejection(f"`{name}` is used by all ranks, inside and outside the region")
    for path in [*region.shared_arguments, *(s.path for s in region.slices)]:
        if path in numbers.derived and _reached_outside(Leaf("argument", path), region.rowwise, probe) is not None:
            raise Rejection("its input depends on an input of the block that is also used outside the region")
