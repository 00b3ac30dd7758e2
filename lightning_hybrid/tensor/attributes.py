"""Integer attributes that a rank has to divide: numbers of heads, widths of all heads, split sizes.

A forward that reshapes by such a number fails, or gives wrong results, on a rank's part of the channels. The numbers to
divide are found by trial, nearest modules first; `verify` decides whether a choice is correct.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from torch import nn

from lightning_hybrid.spec.tensor_plan import UnitPlan
from lightning_hybrid.tensor.probe import Trial

Attributes = dict[str, dict[str, int]]
"""By module name, then by attribute: `num_heads`, or `config.num_heads` of an object that the module holds."""

_MAX_TOGETHER = 3
"""Most attributes divided together: for example number of heads, width of all heads, width of a chunk."""
_MAX_CHOICES = 150
"""Most choices tried for one region; empirical (unmodified transformers blocks need fewer than 90)."""
_INDEX_NAMES = ("idx", "index", "_id", "number", "padding")
"""Attributes with these in their names are positions, not sizes."""


class _Candidate(NamedTuple):
    module: str
    attribute: str
    value: int
    divided: int


_Round = tuple[list[_Candidate], Callable[[_Candidate], Any], dict[str, int]]
"""Attributes, what makes them one choice, and modules that read a width from their input."""


def candidates(plan: UnitPlan, region: UnitPlan, trial: Trial, ranks: int) -> Iterator[UnitPlan]:
    """Yields `plan`, then `plan` with attributes divided by `ranks`, the likelier choices first.

    Args:
        plan: The plan of the unit, the region included.
        region: The region near whose modules attributes are searched.
        trial: A run of the whole unit.
        ranks: Number of ranks.
    """
    tried: list[tuple[Attributes, dict[str, int]]] = []
    rounds = list(_rounds(plan.attributes, region, trial, ranks))
    for count in range(_MAX_TOGETHER + 1):
        for options, key, widths in rounds:
            for chosen in combinations(dict.fromkeys(key(c) for c in options), count):
                attributes = {name: dict(values) for name, values in plan.attributes.items()}
                for c in options:
                    if key(c) in chosen:
                        attributes.setdefault(c.module, {})[c.attribute] = c.divided
                choice = attributes, {**plan.widths, **widths}
                if choice in tried:
                    continue
                tried.append(choice)
                yield replace(plan, attributes=attributes, widths=choice[1])
                if len(tried) > _MAX_CHOICES:
                    return


def attribute_entries(unit: nn.Module, attributes: Attributes) -> list[tuple[nn.Module, str, Any]]:
    """Returns (module, key, value) to set in instance dictionaries so that modules of `unit` have `attributes`."""
    entries: list[tuple[nn.Module, str, Any]] = []
    for name, values in attributes.items():
        module = unit.get_submodule(name)
        local: dict[str, Any] = {}
        for attribute, value in values.items():
            holder, _, key = attribute.rpartition(".")
            if not holder:
                entries.append((module, key, value))
                continue
            if holder not in local:
                local[holder] = copy.copy(getattr(module, holder))
                entries.append((module, holder, local[holder]))
            local[holder].__dict__[key] = value
    return entries


def _rounds(start: Attributes, region: UnitPlan, trial: Trial, ranks: int) -> Iterator[_Round]:
    unit = trial.numbers.module
    owners = list(dict.fromkeys([*region.rowwise, *region.colwise, *(n.rpartition(".")[0] for n in region.parameters)]))
    parents = list(dict.fromkeys(o.rpartition(".")[0] for o in owners if o))
    ancestors = list(parents)
    for name in parents:
        while name:
            name = name.rpartition(".")[0]
            ancestors += [name] if name not in ancestors else []
    children = [f"{n}.{c}" if n else c for n in parents for c, _ in unit.get_submodule(n).named_children()]
    around = list(dict.fromkeys([*ancestors, *owners, *children]))
    width = trial.inputs[region.rowwise[0]][0].shape[-1]

    def search(names: list[str], local: bool, factors: Iterable[int] = (ranks,)) -> list[_Candidate]:
        options = [c for name in names for factor in factors for c in _candidates(name, unit, factor, local)]
        return [c for c in options if c.attribute not in start.get(c.module, {})]

    yield search(parents, False), lambda c: c.attribute, {}
    for name in ancestors:
        yield search(parents, False), lambda c: c.attribute, {name: width}
    yield search(ancestors, False), lambda c: c.attribute, {}
    yield search(parents, True), lambda c: c.attribute, {}
    factors = [f for f in range(2, ranks + 1) if ranks % f == 0]
    yield search(parents, False, factors), lambda c: (c.attribute, c.value // c.divided), {}
    yield search(around, False), lambda c: c.attribute, {}
    yield search(around, False), lambda c: (c.module, c.attribute), {}
    yield search(around, False), lambda c: c.value, {}


def _candidates(name: str, unit: nn.Module, factor: int, local: bool) -> list[_Candidate]:
    """Returns the integer attributes of one module, divided by `factor`; with `local` also those of objects it uses."""
    module = unit.get_submodule(name)
    words = _names_in_code(type(module))
    options = [
        _Candidate(name, attribute, value, value // factor)
        for attribute, value in module.__dict__.items()
        if _divides(value, factor)
    ]
    for holder, value in module.__dict__.items() if local else ():
        if holder.startswith("_") or holder not in words or not hasattr(value, "__dict__") or callable(value):
            continue
        options += [
            _Candidate(name, f"{holder}.{attribute}", number, number // factor)
            for attribute, number in vars(value).items()
            if attribute in words and _divides(number, factor)
        ]
    options = [c for c in options if not is_position(c.attribute)]
    return sorted(options, key=lambda c: c.attribute not in words)


def is_position(attribute: str) -> bool:
    """Returns True if an integer attribute is a position rather than a size, judged by its name."""
    return any(word in attribute for word in _INDEX_NAMES)


def _divides(value: Any, ranks: int) -> bool:
    return type(value) is int and value >= ranks and value % ranks == 0


def _names_in_code(cls: type) -> set[str]:
    """Returns the attribute names that the methods of a module class use, without `__init__`."""
    words: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for method, function in vars(base).items():
            function = getattr(function, "__wrapped__", function)
            code = getattr(function, "__code__", None)
            if code is not None and method != "__init__":
                words.update(code.co_names)
    return words
