"""The record of a dry run: the calls of units in a step, and what crosses the cuts before them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from lightning_hybrid._torch_private import TreeSpec, flatten_fields
from lightning_hybrid.ghosts.attributes import Attributes, LeftAttribute, left_attribute
from lightning_hybrid.ghosts.contract import StepContract
from lightning_hybrid.ghosts.free_code import FreeCall
from lightning_hybrid.ghosts.ghost import Ghost, is_differentiable
from lightning_hybrid.ghosts.use import StepUse

_CONSTANTS = (str, bytes, int, float, complex, type(None))
"""Types of arguments that are no results if they are returned."""
Source = tuple[str, Any, int]
"""The name of a tensor on all stages.

`("arg", c, i)` is leaf i of the arguments of call c, `("out", j, i)` is leaf i of what call j returned, followed by its
arguments with the lists and dictionaries that it has filled, and by what it has left in attributes, and
`("free", f, i)` is leaf i of what the call f of a torch function outside units (a `FreeCall`) returned.
"""


@dataclass(frozen=True, kw_only=True)
class CrossingValue:
    """A tensor that one stage computes and a later one uses."""

    source: Source
    shape: tuple[int, ...]
    dtype: torch.dtype
    written: bool
    """True if the value is written in place after the cut; the receiver then needs a copy of the received buffer."""

    @property
    def differentiable(self) -> bool:
        """True if gradients can flow through the value."""
        return is_differentiable(self.dtype)

    def example(self, device: torch.device) -> torch.Tensor:
        """Returns a tensor as it is sent: a complex value as pairs of real numbers."""
        real = self.dtype.to_real() if self.dtype.is_complex else self.dtype
        shape = (*self.shape, 2) if self.dtype.is_complex else self.shape
        return torch.empty(shape, dtype=real, device=device, requires_grad=self.differentiable)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The values that cross at the entry of one unit call, or the reason why the step cannot be cut there."""

    values: tuple[CrossingValue, ...] = ()
    refusal: str | None = None


@dataclass(kw_only=True)
class UnitCall:
    """One call of a unit in the step."""

    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    spec: TreeSpec | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the tensors among the arguments."""
    leaves: list[Any] = field(default_factory=list)
    """How to rebuild the output without running the unit: `("in", i)`, `("ghost", meta)`, `("value", x)`, or
    `("same", i)` for leaf i once more."""
    left: list[LeftAttribute] = field(default_factory=list)
    """Attributes of the unit's modules with tensors that it computes."""
    skippable: bool = True
    """False if the unit returns, or leaves in attributes, values that are neither None nor ghosts: numbers, or tensors
    computed from the batch. Stages without the unit run it on ghosts."""
    selects: bool = False
    """True if the shapes of results may depend on values of the arguments, such as those of a mask."""
    reads: bool = False
    """True if the unit reads values of tensors."""
    concrete: bool = False
    """True if the unit ran on random values instead of ghosts, since its control flow depends on values (routing)."""

    def describe_output(self, inputs: Sequence[Any], out: Any) -> None:
        """Records how to rebuild the result `out` from the leaves of the arguments."""
        leaves, self.spec = flatten_fields(out)
        positions = {id(x): i for i, x in enumerate(inputs) if not isinstance(x, _CONSTANTS)}
        returned: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if id(leaf) in positions:
                self.leaves.append(("in", positions[id(leaf)]))
            elif not isinstance(leaf, Ghost):
                self.skippable &= leaf is None
                self.leaves.append(("value", leaf))
            else:
                first = returned.setdefault(id(leaf), i)
                self.leaves.append(("ghost", leaf.meta) if first == i else ("same", first))
        self.skippable &= self.concrete or not self.selects

    def describe_attributes(self, known: list[Any], inputs: Sequence[Any], attributes: Attributes) -> None:
        """Records how to rebuild attributes that the unit has changed, and adds their leaves to `known`."""
        for module, key, value in attributes.changed():
            left = left_attribute(module, key, value, known, inputs)
            if left is not None:
                self.left.append(left)
                known += left.present()


@dataclass(kw_only=True)
class Trace:
    """The data flow of one step on one microbatch."""

    calls: list[UnitCall]
    cuts: dict[int, Cut]
    """Cuts by the index of the call at whose entry the step is cut; 1 to len(calls) - 1."""
    parameter_uses: dict[str, tuple[int, ...]]
    """Intervals that use each parameter (by first name); unused parameters are absent."""
    flops: list[float]
    """Forward FLOPs of interval -1 and of each call's interval, for this microbatch; length len(calls) + 1."""
    takes_gradients: bool = False
    """True if the step calls `torch.autograd.grad`."""
    depends_on_values: bool = False
    """True if shapes, Python numbers or truth values depend on values of the batch, such as those of a mask."""
    answers: dict[str, Any] = field(default_factory=dict)
    """Values for reads that decide nothing, on stages that have no value, by place (see `reads`)."""
    use: StepUse | None = None
    """How weights and results of units are used; None if not recorded."""
    free_counts: Mapping[tuple[int, str], int] = field(default_factory=dict)
    """Number of calls of torch functions outside units, by interval and function."""
    written: frozenset[FreeCall] = frozenset()
    """Calls outside units that create a tensor of which units compute a part (`seen = torch.zeros(...)`)."""
    contract: StepContract = StepContract()
    """State that the step changes."""
    lists_parameters: bool = False
    """True if code outside of units asks for the parameters of a module."""
    followers: dict[str, set[str]] = field(default_factory=dict)
    """By weight that the step or a hook writes: the weights that its new value comes from."""
    ghost_writes: frozenset[str] = frozenset()
    """Lines of the user's code that write values of ghosts into real tensors."""

    def outline(self) -> Hashable:
        """Returns a key that is equal for traces with the same calls, cuts, uses of parameters and changes of state."""
        calls = tuple((c.name, c.skippable, tuple(kind for kind, _ in c.leaves)) for c in self.calls)
        return calls, tuple(self.cuts.items()), tuple(self.parameter_uses.items()), self.contract, self.ghost_writes

    def different_call(self, other: Trace) -> tuple[int, str, str] | None:
        """Returns the first call of other units than in `other`: its index and both names ("" for none)."""
        names = [[call.name for call in trace.calls] for trace in (self, other)]
        found = enumerate(zip_longest(*names, fillvalue=""))
        return next(((i, mine, theirs) for i, (mine, theirs) in found if mine != theirs), None)

    def refuse_different_cuts(self, first: Trace, other: Trace) -> None:
        """Refuses the cuts at which `first` and `other`, traces of equally large batches, have other shapes."""
        different = first.different_call(other)
        same = len(self.calls) if different is None else different[0]
        for c in self.cuts.keys() & first.cuts.keys() & other.cuts.keys() & set(range(same)):
            shapes = [[value.shape for value in trace.cuts[c].values] for trace in (first, other)]
            if self.cuts[c].refusal is None and shapes[0] != shapes[1]:
                counts = tuple(f"{len(some)} tensors" for some in shapes)
                different = next((pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]), counts)
                refusal = (
                    "the shape of a tensor depends on values of the batch, such as those of a mask, at this point: "
                )
                self.cuts[c] = Cut(refusal=f"{refusal}{different[0]} for one microbatch and {different[1]} for another")

    def release(self) -> None:
        """Frees the ghosts and copies of the dry run, after planning."""
        for call in self.calls:
            call.args, call.kwargs = (), {}
        self.use = None


def shapes_of(values: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of the tensors among `values`."""
    return tuple(tuple(x.shape) for x in values if isinstance(x, torch.Tensor))
