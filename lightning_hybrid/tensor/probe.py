"""Data flow of a unit: which weights and channels feed which others, from gradients.

The unit is run once on random numbers, with the autograd graph cut behind every linear module: the output of a linear
becomes a leaf. The input of each linear is then a function of a few leaves only (outputs of earlier linears, other
parameters, arguments, buffers); a gradient that is exactly zero means that there is no dependency. A cotangent that is
non-zero on some channels of the input only shows the channels of leaves that these input channels depend on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lightning_hybrid._torch_private import own_parameters
from lightning_hybrid.ghosts.trees import map_tensors
from lightning_hybrid.spec.tensor_plan import Path
from lightning_hybrid.tensor.numbers import Numbers, is_float, shadowed

FORWARD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ZeroDivisionError,
)
"""Errors of a user's forward whose tensors or attributes do not have the expected shapes."""


LeafKind = Literal["linear", "opaque", "parameter", "buffer", "argument"]


class Leaf(NamedTuple):
    """A leaf of the cut graph."""

    kind: LeafKind
    name: str | Path


Reach = dict[Leaf, torch.Tensor]
"""Boolean masks of the dependencies: over the last dim for linears and opaque modules, else of the full shape."""


def linear_dims(module: nn.Module) -> tuple[int, int] | None:
    """Returns (output dim, input dim) of the weight if `module` is a linear that holds its weight, else None."""
    weight = own_parameters(module).get("weight", module.__dict__.get("weight"))
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    if isinstance(module, nn.Linear):
        return 0, 1
    transposed = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
    return (1, 0) if transposed else None


def is_opaque(module: nn.Module) -> bool:
    """Returns True if `module` computes with weights of its children and has a special tensor-parallel forward."""
    return isinstance(module, nn.MultiheadAttention)


@dataclass
class Trial:
    """One run of a unit, cut at every linear; `inputs` and `outputs` by name of the linear, one per call."""

    numbers: Numbers
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    leaves: dict[Leaf, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    results: list[torch.Tensor] = field(default_factory=list)

    unused_results: frozenset[int] = frozenset()

    def drop_results(self, positions: Collection[int]) -> None:
        """Removes the results at `positions`, which nothing consumes."""
        self.unused_results = frozenset(positions)
        self.results = self.consumed(self.results)

    def consumed(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the consumed ones among the unit's results."""
        return [tensor for i, tensor in enumerate(results) if i not in self.unused_results]

    def new_leaf(self, leaf: Leaf, value: torch.Tensor) -> torch.Tensor:
        """Adds a leaf with the given value; returns a copy for the unit, which may write to it in place."""
        if not is_float(value):
            return value.clone()
        tensor = value.detach().requires_grad_()
        self.leaves[leaf].append(tensor)
        return tensor.clone()

    def new_leaves(self, kind: LeafKind, values: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """Adds a leaf for each value; a tensor under several names becomes one leaf."""
        leaves: dict[int, torch.Tensor] = {}
        for name, value in values.items():
            if id(value) not in leaves:
                leaves[id(value)] = self.new_leaf(Leaf(kind, name), value)
        return {name: leaves[id(value)] for name, value in values.items()}

    def reach(self, targets: Iterable[torch.Tensor], part: tuple[int, int] | None = None) -> Reach:
        """Returns the leaves and channels that `targets` depend on.

        Args:
            targets: Tensors of the cut graph.
            part: `(rank, ranks)`: probes that contiguous part of the last dim only.
        """
        targets = [t for t in targets if t.requires_grad]
        if not targets:
            return {}
        generator = torch.Generator().manual_seed(1)
        cotangents = []
        for target in targets:
            cotangent = torch.zeros_like(target)
            length = target.shape[-1] // part[1] if part and target.ndim else 0
            region = cotangent.narrow(-1, part[0] * length, length) if part and target.ndim else cotangent
            region.uniform_(0.5, 1.5, generator=generator)
            cotangents.append(cotangent)
        flat = [(leaf, tensor) for leaf, tensors in self.leaves.items() for tensor in tensors]
        gradients = torch.autograd.grad(targets, [t for _, t in flat], cotangents, retain_graph=True, allow_unused=True)
        reached: Reach = {}
        for (leaf, _), gradient in zip(flat, gradients, strict=True):
            if gradient is None:
                continue
            mask = gradient != 0  # also true where the gradient is NaN
            if leaf.kind in ("linear", "opaque"):
                mask = mask.reshape(-1, mask.shape[-1]).any(0) if mask.ndim else mask
            if bool(mask.any()):
                reached[leaf] = reached[leaf] | mask if leaf in reached else mask
        return reached


def run_trial(numbers: Numbers) -> Trial:
    """Runs the unit once on `numbers`.

    Raises:
        FORWARD_ERRORS: If the unit cannot run on `numbers`.
    """
    trial = Trial(numbers)
    names = {module: name for name, module in numbers.module.named_modules()}

    def cut_linear(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        name = names[module]
        given = args[0] if args else kwargs["input"]
        trial.inputs[name].append(given.clone())
        trial.outputs[name].append(output.detach().clone())
        return trial.new_leaf(Leaf("linear", name), output)

    def cut_opaque(module: nn.Module, args: tuple, output: Any) -> Any:
        return map_tensors(lambda _, tensor: trial.new_leaf(Leaf("opaque", names[module]), tensor), output)

    parameters = trial.new_leaves("parameter", numbers.parameters)
    buffers = trial.new_leaves("buffer", numbers.buffers)
    arguments = trial.new_leaves("argument", numbers.arguments)
    linears = [module for module in names if linear_dims(module) is not None]
    handles = [module.register_forward_hook(cut_linear, with_kwargs=True) for module in linears]
    handles += [module.register_forward_hook(cut_opaque) for module in names if is_opaque(module)]
    try:
        torch.default_generator.manual_seed(0)
        with shadowed(numbers.entries(parameters, buffers)):
            trial.results = numbers.run(arguments)
    finally:
        for handle in handles:
            handle.remove()
    return trial


class Probe:
    """The data flow of one unit over several trials, since a channel that is dead in one may be alive in another."""

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials
        self.linears = list(trials[0].inputs)
        """Linears in the order of their first call."""
        self.outside = merge([trial.reach(trial.results) for trial in trials])
        """Dependencies of the unit's result, other than through linears."""
        self._whole: dict[str, Reach] = {}
        self._parts: dict[tuple[str, int], list[Reach]] = {}

    def whole(self, linear: str) -> Reach:
        """Returns the dependencies of the input of `linear`."""
        if linear not in self._whole:
            self._whole[linear] = merge([trial.reach(trial.inputs[linear]) for trial in self.trials])
        return self._whole[linear]

    def parts(self, linear: str, ranks: int) -> list[Reach]:
        """Returns the dependencies of each of `ranks` equal parts of the input of `linear`."""
        key = linear, ranks
        if key not in self._parts:
            self._parts[key] = [
                merge([trial.reach(trial.inputs[linear], (rank, ranks)) for trial in self.trials])
                for rank in range(ranks)
            ]
        return self._parts[key]


def merge(reaches: list[Reach]) -> Reach:
    """Returns the union of several reaches."""
    union: Reach = {}
    for reach in reaches:
        for leaf, mask in reach.items():
            union[leaf] = union[leaf] | mask if leaf in union else mask
    return union
