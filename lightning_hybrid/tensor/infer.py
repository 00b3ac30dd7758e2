"""Infers how a model is divided over the `tp` axis, from its own data flow.

Runs each unit (block) on random numbers in this process, derives from gradients which channels of which weights feed
which others, and verifies every division by running the unit as each rank would. No model is named. The result depends
on the module and fixed seeds only, so it is equal on all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from lightning_hybrid.ghosts.trees import sorted_slots
from lightning_hybrid.ghosts.use import StepUse
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.tensor_plan import ShardedParameter, TensorPlan, UnitPlan, one_of_many
from lightning_hybrid.tensor.numbers import Slot
from lightning_hybrid.tensor.outside import (
    NotDivisible,
    Single,
    divide_attention,
    divide_embedding,
    divide_gathered,
)
from lightning_hybrid.tensor.overrides import Overrides, parse_overrides
from lightning_hybrid.tensor.probe import linear_dims
from lightning_hybrid.tensor.regions import Constraints
from lightning_hybrid.tensor.signature import signature_of
from lightning_hybrid.tensor.unit import UnitFlow, infer_unit

_WORTHWHILE = 0.01
"""A module outside the blocks is divided if it has this fraction of the parameters; adds a collective per step."""
_OTHER_SIZES = (2, 3, 4, 6, 8)
_SHOWN_REASONS = 6


class RecordedCall(Protocol):
    """One call of a unit in a step."""

    @property
    def name(self) -> str:
        """The unit."""
        ...

    @property
    def args(self) -> tuple:
        """Positional arguments; ghosts, and tensors that require gradients, depend on parameters."""
        ...

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments."""
        ...


def infer_tensor_plan(
    root: nn.Module,
    calls: Iterable[RecordedCall],
    size: int,
    overrides: Mapping[str, str] | None = None,
    use: StepUse | None = None,
) -> TensorPlan:
    """Infers how the weights of `root` are divided over a `tp` axis.

    Args:
        root: The module; its parameters may be real, on the meta device or ghosts. It is not changed.
        calls: Recorded calls of the units of `root`, which do not contain each other; the first call of each counts.
        size: Ranks on the axis.
        overrides: `{pattern: choice}` over module names: `"colwise"`, `"rowwise"`, `"replicate"` or `"colwise_gather"`.
        use: How a step uses weights, from `record_use`. Without `use`, modules outside the units stay replicated.

    Returns:
        A plan that divides at least one weight.

    Raises:
        PartitionError: If nothing can be divided, or an override cannot be met.
        ValueError: If an override is malformed.
    """
    calls = list(calls)
    plan = _Inference(root, calls, size, parse_overrides(root, overrides), use).plan()
    if plan.parameters:
        return plan
    reasons: dict[str, str] = {}
    for name, reason in plan.reasons.items():
        reasons.setdefault(one_of_many(name), reason)
    tried = "; ".join(f"`{name}`: {reason}" for name, reason in list(reasons.items())[:_SHOWN_REASONS])
    others = [n for n in _OTHER_SIZES if n != size]
    works = [n for n in others if _Inference(root, calls, n, parse_overrides(root, overrides), use).plan().parameters]
    raise PartitionError(
        f"`layout`: tp={size} cannot divide any weight of `{type(root).__name__}`. "
        f"Tried: {tried or 'no linear, embedding or convolution was called'}. "
        + (f"These sizes work: {', '.join(f'tp{n}' for n in works)}." if works else "Use the axes dp, fsdp or pp.")
    )


class _Inference:
    """Infers the plan of one module; methods run in the order of their definitions."""

    def __init__(
        self, root: nn.Module, calls: list[RecordedCall], size: int, overrides: Overrides, use: StepUse | None
    ) -> None:
        self.root, self.size, self.overrides, self.use = root, size, overrides, use
        self.calls = {call.name: call for call in reversed(calls)}
        self.calls = {call.name: self.calls[call.name] for call in calls}
        self.slots = {slot.name: slot for slot in sorted_slots(root)}
        self.aliases: dict[int, list[Slot]] = {}
        for slot in self.slots.values():
            self.aliases.setdefault(id(slot.tensor), []).append(slot)
        self.total = sum(slots[0].tensor.numel() for slots in self.aliases.values())
        self.names = {module: name for name, module in root.named_modules()}
        self.shared_modules = _in_several(root, self.calls)
        self.units: dict[str, UnitPlan] = {}
        self.called: set[str] = set(use.called) if use is not None else set()
        self.repeated: set[str] = set()
        self.parameters: dict[str, ShardedParameter] = {}
        self.singles: dict[str, Single] = {}
        self.reasons: dict[str, str] = {}

    def plan(self) -> TensorPlan:
        self._infer_units()
        self._infer_attention()
        self._infer_outside()
        regions = any(unit.rowwise for unit in self.units.values()) or self.singles_of("attention")
        if not regions:
            self._infer_fallback()
        divided = {id(self.slots[name].tensor) for name in self.parameters}
        plan = TensorPlan(
            size=self.size,
            units=self.units,
            parameters=dict(sorted(self.parameters.items())),
            embeddings=self.singles_of("embedding"),
            gathered=self.singles_of("gathered"),
            attention=self.singles_of("attention"),
            used_outside=self._used_outside(),
            written=tuple(sorted(self.use.written)) if self.use is not None else (),
            reasons={n: r for n, r in self.reasons.items() if n not in self.singles},
            sharded_elements=sum(s[0].tensor.numel() for i, s in self.aliases.items() if i in divided),
            total_elements=self.total,
        )
        self.overrides.check(plan)
        return plan

    def singles_of(self, kind: str) -> tuple[str, ...]:
        return tuple(name for name, single in self.singles.items() if single.kind == kind)

    # ---- units

    def _infer_units(self) -> None:
        known: dict[Any, UnitFlow] = {}
        signatures: dict[str, Any] = {}
        for name, call in self.calls.items():
            module, constraints = self.root.get_submodule(name), self._constraints(name)
            rows = frozenset(self._relative(name, self.overrides.named("rowwise")))
            key = signature_of(module, call), rows, str(constraints)
            signatures[name] = key
            if key not in known:
                known[key] = infer_unit(module, call.args, call.kwargs, self.size, constraints, rows.__contains__)
            flow = known[key]
            prefix = f"{name}." if name else ""
            self.units[name] = flow.plan
            self.parameters |= {prefix + n: s for n, s in flow.plan.parameters.items()}
            self.called |= {(prefix + n).rstrip(".") for n in flow.called}
            self.reasons |= {(prefix + n).rstrip("."): reason for n, reason in flow.reasons.items()}
        counts = Counter(signatures.values())
        self.repeated = {name for name, key in signatures.items() if counts[key] > 1}

    def _relative(self, unit: str, names: Iterable[str]) -> list[str]:
        prefix = f"{unit}." if unit else ""
        return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def _constraints(self, unit: str) -> Constraints:
        module = self.root.get_submodule(unit)
        prefix = f"{unit}." if unit else ""
        gathered = self.overrides.named("colwise_gather")
        replicated = [
            name
            for name, _ in module.named_modules()
            if self.overrides.replicated(prefix + name) or prefix + name in gathered
        ]
        shared = [
            name for name, m in module.named_modules() if m in self.shared_modules or self._transformed(prefix + name)
        ]
        elsewhere = []
        for slot in self.slots.values():
            if not slot.name.startswith(prefix):
                continue
            tied = len(self.aliases[id(slot.tensor)]) > 1
            kept = self.overrides.replicated(slot.name.rpartition(".")[0])
            used = self.use is not None and (slot.name in self.use.written or self.use.users(slot.name, unit))
            if tied or kept or used:
                elsewhere.append(slot.name.removeprefix(prefix))
        unused = self.use.unused_results(unit) if self.use is not None else set()
        return Constraints(
            replicated=tuple(replicated),
            used_elsewhere=tuple(elsewhere),
            shared_modules=tuple(shared),
            unused_results=tuple(sorted(unused)),
        )

    # ---- single modules

    def _infer_attention(self) -> None:
        for module, name in self.names.items():
            if isinstance(module, nn.MultiheadAttention) and self._was_called(name):
                self._try(name, module, divide_attention)

    def _infer_outside(self) -> None:
        """Divides embeddings and heads; modules that share a weight are divided together."""
        if self.use is None and not self.overrides.named("colwise_gather"):
            return
        candidates: dict[str, Single] = {}
        forced = self.overrides.named("colwise_gather")
        for module, name in self.names.items():
            if self._outside(name, module) or name in forced:
                divide = divide_embedding if isinstance(module, nn.Embedding) else divide_gathered
                single = self._attempt(name, module, divide)
                if single is not None:
                    candidates[name] = single
        while candidates and (refused := self._sharing_refused(candidates)):
            self.reasons |= refused
            candidates = {name: single for name, single in candidates.items() if name not in refused}
        for name, single in candidates.items():
            self._accept(name, single)

    def _sharing_refused(self, candidates: dict[str, Single]) -> dict[str, str]:
        """Returns the candidates whose parameters another module computes with, and the reason for each."""
        refused: dict[str, str] = {}
        for name, single in candidates.items():
            for key, sharded in single.parameters.items():
                slots = self.aliases[id(self.slots[f"{name}.{key}"].tensor)]
                holders = {slot.name.rpartition(".")[0] for slot in slots}
                users = holders if self.use is None else self.use.computing.get(f"{name}.{key}", set()) | {name}
                others = sorted(users - candidates.keys())
                if others:
                    refused[name] = f"`{others[0] or type(self.root).__name__}` computes with its `{key}` too"
                elif any(candidates[user].parameters.get(key) != sharded for user in users):
                    refused[name] = f"its `{key}` is shared with a module that would divide it in another way"
        return refused

    def _infer_fallback(self) -> None:
        """Divides output channels of linears and convolutions, and gathers the outputs; used if there is no region."""
        for module, name in self.names.items():
            if name in self.singles or f"{name}.weight" not in self.slots or not self._was_called(name):
                continue
            slots = self.aliases[id(self.slots[f"{name}.weight"].tensor)]
            worthwhile = slots[0].tensor.numel() >= _WORTHWHILE * self.total
            if len(slots) == 1 and worthwhile and not isinstance(module, nn.Embedding):
                self._try(name, module, divide_gathered)

    def _used_outside(self) -> tuple[str, ...]:
        if self.use is None:
            return ()
        names = []
        for name in self.slots.keys() - self.parameters.keys():
            unit = self._unit_of(name)
            shared = self.slots[name].module in self.shared_modules or self._transformed(name.rpartition(".")[0])
            if unit is not None and (shared or self.use.users(name, unit)):
                names.append(name)
        return tuple(sorted(names))

    def _transformed(self, module: str) -> bool:
        return self.use is not None and module in self.use.transformed

    def _unit_of(self, name: str) -> str | None:
        return next((u for u in self.calls if name == u or name.startswith(f"{u}.") or not u), None)

    def _was_called(self, name: str) -> bool:
        if self.use is not None:
            return name in self.called
        return name in self.called or self._unit_of(name) is not None

    def _outside(self, name: str, module: nn.Module) -> bool:
        """Returns True if `module` was called, lies in no block and is large enough to be divided alone."""
        slot = self.slots.get(f"{name}.weight")
        if slot is None or name not in self.called or slot.tensor.numel() < _WORTHWHILE * self.total:
            return False
        if slot.name in self.parameters or any(name.startswith(f"{a}.") for a in self.singles_of("attention")):
            return False
        if not isinstance(module, nn.Embedding) and linear_dims(module) is None:
            return False
        unit = self._unit_of(name)
        if unit is None:
            return True
        if isinstance(module, nn.Embedding):
            return slot.name.removeprefix(f"{unit}.") not in self.units[unit].partial
        return unit not in self.repeated and not self.units[unit].rowwise

    def _attempt(self, name: str, module: Any, divide: Callable[..., Single]) -> Single | None:
        try:
            if self.overrides.replicated(name):
                raise NotDivisible("`tensor_plan` keeps it replicated")
            if self._transformed(name):
                raise NotDivisible("a transform of `torch.func` runs it")
            written = sorted(w for w in ([] if self.use is None else self.use.written) if w.startswith(f"{name}."))
            if written:
                raise NotDivisible(f"the step writes `{written[0]}`")
            return divide(module, self.size)
        except NotDivisible as error:
            self.reasons[name] = str(error)
            return None

    def _try(self, name: str, module: Any, divide: Callable[..., Single]) -> None:
        """Divides `module` if no other module holds or computes with its weights."""
        single = self._attempt(name, module, divide)
        if single is None:
            return
        for key in single.parameters:
            parameter = f"{name}.{key}" if name else key
            others = self.use.users(parameter, name) if self.use is not None else set()
            if len(self.aliases[id(self.slots[parameter].tensor)]) > 1 or others:
                self.reasons[name] = f"its `{key}` is shared with or used by another module"
                return
        self._accept(name, single)

    def _accept(self, name: str, single: Single) -> None:
        self.singles[name] = single
        for key, sharded in single.parameters.items():
            tensor = self.slots[f"{name}.{key}" if name else key].tensor
            self.parameters |= {slot.name: sharded for slot in self.aliases[id(tensor)]}


def _in_several(root: nn.Module, units: Iterable[str]) -> set[nn.Module]:
    """Returns the modules that are inside of more than one of `units`."""
    counts = Counter(module for name in units for module in root.get_submodule(name).modules())
    return {module for module, count in counts.items() if count > 1}
