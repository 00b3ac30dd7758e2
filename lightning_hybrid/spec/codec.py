"""Frozen dataclasses as plain data (mappings, lists, texts, numbers) and back, and plain data as YAML."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.tensor_index import runs_of

_LONG = 8
"""Smallest number of integers of a sequence that is written as runs, if that is shorter."""
_SHORT = 100
"""Characters per line."""
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader in C is about ten times as fast; a plan of a large model has thousands of lines."""


def encode(value: Any) -> Any:
    """Returns `value` as plain data; fields that are empty by default and empty are left out."""
    if isinstance(value, Layout):
        return str(value)
    if is_dataclass(value):
        return {f.name: encode(v) for f in fields(value) if not _left_out(f, v := getattr(value, f.name))}
    if isinstance(value, Mapping):
        return {key: encode(v) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return _runs(value) or [encode(v) for v in value]
    return value


def _left_out(field: Any, value: Any) -> bool:
    if field.default is MISSING and field.default_factory is MISSING:
        return False
    default = field.default if field.default is not MISSING else field.default_factory()
    return value is None or (value == default and value in ((), {}))


def _runs(values: tuple | list) -> str | None:
    """Returns integers as runs, such as `0-3 8-11`; None if a list is as short or there are other values."""
    if len(values) < _LONG or not all(type(v) is int and v >= 0 for v in values):
        return None
    runs = runs_of(values)
    return " ".join(f"{a}-{b - 1}" for a, b in runs) if 2 * len(runs) < len(values) else None


def decode(kind: Any, data: Any, where: str) -> Any:
    """Returns plain data as a value of the type `kind`; the inverse of `encode`.

    Args:
        kind: A dataclass, or a type that one of its fields may have.
        data: Plain data.
        where: Name of the data in errors.

    Raises:
        ValueError: If the data does not have this type; names the place and what was found.
    """
    origin: Any = get_origin(kind)
    arguments = get_args(kind)
    if kind is Layout:
        return Layout.parse(data)
    if is_dataclass(kind):
        return _decode_fields(kind, data, where)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is Literal and data in arguments:
        return data
    if origin is tuple and isinstance(data, str) and arguments == (int, ...):
        data = _from_runs(data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(data))
    if origin in (dict, Mapping) and isinstance(data, dict):
        return {decode(arguments[0], k, where): decode(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    if kind is float and type(data) is int:
        return float(data)
    if isinstance(kind, type) and type(data) is kind:
        return data
    raise ValueError(f"`{where}` must be {getattr(kind, '__name__', kind) if origin is None else kind}. Got {data!r}.")


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    kinds = tuple(k for k in kinds if k is not type(None))
    same = [k for k in kinds if k is type(data)]
    return decode((same or kinds)[0], data, where)


def _decode_fields(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"`{where}` must be a mapping. Got {data!r}.")
    known = {f.name: f for f in fields(kind)}
    for name in data:
        if name not in known:
            raise ValueError(f"`{where}` has no field {name!r}. Its fields are {', '.join(known)}.")
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"`{where}` lacks `{name}`.")
    hints = get_type_hints(kind)
    return kind(**{name: decode(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _from_runs(text: str, where: str) -> list[int]:
    found: list[int] = []
    for run in text.split():
        first, _, last = run.partition("-")
        if not (first + last).isdigit():
            raise ValueError(f"`{where}` must be integers or runs of them such as '0-3 8-11'. Got {text!r}.")
        found += range(int(first), int(last or first) + 1)
    return found


class Shared(dict):
    """A mapping that is written once, at its first occurrence; later occurrences refer to it."""


class _Dumper(yaml.SafeDumper):
    """Writes short values on one line, and equal values in full unless they are `Shared`."""

    def ignore_aliases(self, data: Any) -> bool:
        return not isinstance(data, Shared)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        return super().represent_mapping(tag, mapping, len(str(mapping)) < _SHORT)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        texts = any(isinstance(value, str) for value in sequence)
        return super().represent_sequence(tag, sequence, None if not texts or len(str(sequence)) < _SHORT else False)


_Dumper.add_representer(Shared, yaml.SafeDumper.represent_dict)


def to_text(data: Any) -> str:
    """Returns plain data as YAML, in its own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def from_text(text: str) -> Any:
    """Returns the plain data of a YAML text.

    Raises:
        ValueError: If the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_LOADER)  # a safe loader, which makes plain data only
    except yaml.YAMLError as error:
        raise ValueError(f"It is not YAML: {error}") from None
