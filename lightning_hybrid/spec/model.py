"""Description of a model for plans: its units and parameters, and the order in which a step calls the units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One parameter; a shared one counts once, under its first name."""

    dtype: str
    """Name of the torch dtype, such as `float32`."""
    shape: tuple[int, ...]
    calls: tuple[int, ...] = ()
    """For `pp`: the calls of the step that use the parameter."""

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Description of a model; models with equal specs can run the same plans."""

    units: Mapping[str, str]
    """The units in the order of `named_modules`, each with the classes of its modules and how many there are."""
    blocks: tuple[str, ...]
    """The units that are elements of a repeated stack."""
    parameters: Mapping[str, ParameterSpec]
    """In the order of `named_parameters`."""
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By module: integer attributes (numbers of heads, widths, experts) that the plan divides."""
    step: str = ""
    """For `pp`: the name of the step function that the stages are planned with."""
    calls: tuple[str, ...] = ()
    """For `pp`: the unit of each call of that step, in order."""
    costs: tuple[float, ...] = ()
    """For `pp`: FLOPs of each call, with what follows it, for one microbatch."""
    places: tuple[int, ...] = ()
    """For `pp`: calls before which the model may be cut."""

    def difference(self, model: ModelSpec) -> str | None:
        """Returns the first difference between this spec, of a plan, and that of a `model`; None if there is none.

        Costs do not count: they depend on the batch. Calls count only if both have been planned with the same step.
        """
        return next(self._differences(model), None)

    def _differences(self, model: ModelSpec) -> Iterator[str]:
        yield from _of_mappings("unit", self.units, model.units)
        yield from _of_mappings(
            "parameter",
            {n: str(p) for n, p in self.parameters.items()},
            {n: str(p) for n, p in model.parameters.items()},
        )
        for name, planned in self.attributes.items():
            found = model.attributes.get(name, {})
            yield from _of_mappings(f"attribute of `{name}`,", planned, found)
        if self.step != model.step:
            return
        for number in range(max(len(self.calls), len(model.calls))):
            ours, theirs = (calls[number] if number < len(calls) else None for calls in (self.calls, model.calls))
            if ours != theirs:
                yield f"call {number} of `{self.step}`: {_shown(ours)} in the plan, {_shown(theirs)} in the model"
        for name, parameter in self.parameters.items():
            if parameter.calls != model.parameters[name].calls:
                yield (
                    f"calls of `{self.step}` that use parameter `{name}`: {list(parameter.calls)} in the plan, "
                    f"{list(model.parameters[name].calls)} in the model"
                )
        if self.places != model.places:
            yield (
                f"calls of `{self.step}` before which the model may be cut: {list(self.places)} in the plan, "
                f"{list(model.places)} in the model"
            )


def _of_mappings(kind: str, planned: Mapping[str, object], found: Mapping[str, object]) -> Iterator[str]:
    """Yields the differences of names, values and order of two mappings, in the order of the plan."""
    for name in [*planned, *(n for n in found if n not in planned)]:
        ours, theirs = planned.get(name, "none"), found.get(name, "none")
        if ours != theirs:
            yield f"{kind} `{name}`: {ours} in the plan, {theirs} in the model"
    for ours, theirs in zip(planned, found, strict=True):
        if ours != theirs:
            yield f"the order of {kind}s: `{ours}` in the plan, where the model has `{theirs}`"


def _shown(name: str | None) -> str:
    return "none" if name is None else f"`{name}`"
