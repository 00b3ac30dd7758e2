"""Integer attributes that a rank has to divide: numbers of heads, widths of all heads, split sizes.

A forward that reshapes by such a number does not run, or runs wrongly, on a rank's part of the channels. Which numbers
have to be divided is found by trying, nearest modules first; `tensor_verify` says whether a choice is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

from torch import nn

from lightning_hybrid.spec.tensor_plan import UnitPlan

Attributes = dict[str, dict[str, int]]
"""By module name, then by attribute: `num_heads`, or `config.num_heads` of an object that the module holds."""

_MAX_TOGETHER = 3
"""Attributes that are divided together: for example number of heads, width of all heads, width of a chunk."""
_MAX_CHOICES = 250
"""Tried for one region before it is given up; empirical (the unmodified transformers blocks need less than 40)."""
_INDEX_NAMES = ("idx", "index", "_id", "number", "padding")
"""Attributes with these in their names are positions, not sizes."""


class _Candidate(NamedTuple):
    module: str
    attribute: str
    value: int


def attribute_choices(start: Attributes, region: UnitPlan, unit: nn.Module, ranks: int) -> Iterator[Attributes]:
    """`start`, then `start` with more attributes divided by `ranks`, the likelier first.

    Args:
        start: Attributes that are divided in any case.
        region: Whose modules to look around.
        unit: The unit that the names belong to.
        ranks: Number of ranks.
    """
    yield start
    tried = [start]
    for candidates, key in _rounds(start, region, unit, ranks):
        groups = list(dict.fromkeys(key(c) for c in candidates))
        for count in range(1, min(_MAX_TOGETHER, len(groups)) + 1):
            for chosen in combinations(groups, count):
                attributes = {name: dict(values) for name, values in start.items()}
                for candidate in candidates:
                    if key(candidate) in chosen:
                        attributes.setdefault(candidate.module, {})[candidate.attribute] = candidate.value // ranks
                if attributes in tried:
                    continue
                tried.append(attributes)
                yield attributes
                if len(tried) > _MAX_CHOICES:
                    return


def attribute_entries(unit: nn.Module, attributes: Attributes) -> list[tuple[nn.Module, str, Any]]:
    """What to put into which instance dictionary for modules to have these attributes."""
    entries: list[tuple[nn.Module, str, Any]] = []
    for name, values in attributes.items():
        module = unit.get_submodule(name)
        held: dict[str, Any] = {}
        for attribute, value in values.items():
            holder, _, key = attribute.rpartition(".")
            if not holder:
                entries.append((module, key, value))
                continue
            if holder not in held:
                held[holder] = copy.copy(getattr(module, holder))
                entries.append((module, holder, held[holder]))
            held[holder].__dict__[key] = value
    return entries


def _rounds(
    start: Attributes, region: UnitPlan, unit: nn.Module, ranks: int
) -> Iterator[tuple[list[_Candidate], Callable[[_Candidate], Any]]]:
    owners = list(dict.fromkeys([*region.rows, *region.columns, *(n.rpartition(".")[0] for n in region.parameters)]))
    parents = list(dict.fromkeys(o.rpartition(".")[0] for o in owners if o))
    ancestors = list(parents)
    for name in parents:
        while name:
            name = name.rpartition(".")[0]
            ancestors += [name] if name not in ancestors else []
    children = [f"{n}.{c}" if n else c for n in parents for c, _ in unit.get_submodule(n).named_children()]
    around = list(dict.fromkeys([*ancestors, *owners, *children]))

    def candidates(names: list[str], held: bool) -> list[_Candidate]:
        found = [c for name in names for c in _candidates(name, unit, ranks, held)]
        return [c for c in found if c.attribute not in start.get(c.module, {})]

    yield candidates(parents, False), lambda c: c.attribute
    yield candidates(ancestors, False), lambda c: c.attribute
    yield candidates(parents, True), lambda c: c.attribute
    yield candidates(around, False), lambda c: c.attribute
    yield candidates(around, False), lambda c: (c.module, c.attribute)
    yield candidates(around, False), lambda c: c.value


def _candidates(name: str, unit: nn.Module, ranks: int, held: bool) -> list[_Candidate]:
    """The divisible integers of one module; with `held` also those of the objects that it holds and its code names."""
    module = unit.get_submodule(name)
    words = _names_in_code(type(module))
    found = [
        _Candidate(name, attribute, value) for attribute, value in module.__dict__.items() if _divides(value, ranks)
    ]
    for holder, value in module.__dict__.items() if held else ():
        if holder.startswith("_") or holder not in words or not hasattr(value, "__dict__") or callable(value):
            continue
        found += [
            _Candidate(name, f"{holder}.{attribute}", number)
            for attribute, number in vars(value).items()
            if attribute in words and _divides(number, ranks)
        ]
    found = [c for c in found if not is_position(c.attribute)]
    return sorted(found, key=lambda c: c.attribute not in words)


def is_position(attribute: str) -> bool:
    """Whether an integer attribute is, by its name, a position rather than a size."""
    return any(word in attribute for word in _INDEX_NAMES)


def _divides(value: Any, ranks: int) -> bool:
    return type(value) is int and value >= ranks and value % ranks == 0


def _names_in_code(cls: type) -> set[str]:
    """The attribute names that the methods of a module class use, other than its `__init__`."""
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
