"""Converts nested Python state to JSON and separate tensors, and back without pickle.

Plain values are written as they are. A dict whose keys are text is a JSON object; every other value is an object with
one key that begins with `$`: `{"$tuple": [...]}`, `{"$tensor": "name in the tensor file"}`. Values of other types are
pickled into `{"$pickle": ...}`, which is read only if the user trusts the file.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import math
import pathlib
import pickle
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import AttributeDict
from torch import Tensor

from lightning_hybrid._lightning_private import twins
from lightning_hybrid.spec.errors import CheckpointError


def encode(value: Any, put: Callable[[Tensor], str], path: str = "") -> Any:
    """Returns `value` in a form that `json.dumps` can write.

    Args:
        value: Nested state.
        put: Stores a tensor and returns its name.
        path: Path of the value in the state, for errors.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return {"$tensor": put(value)}
    kind = _KINDS.get(type(value))
    if kind is not None:
        name, to_plain = kind
        return {name: encode(to_plain(value), put, path)}
    if type(value) in (dict, OrderedDict, defaultdict, *twins(AttributeDict)):
        return _encode_mapping(value, put, path)
    if type(value) is list:
        return [encode(v, put, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufc":
        return {"$numpy": [put(torch.from_numpy(np.array(value))), value.dtype.str, isinstance(value, np.generic)]}
    if isinstance(value, torch.dtype | torch.device):
        return {"$torch": str(value).removeprefix("torch."), "kind": type(value).__name__}
    return _pickled(value, path)


def decode(value: Any, get: Callable[[str], Tensor], trust_pickle: bool, source: str) -> Any:
    """Returns the state that `encode` has converted to `value`.

    Args:
        value: Parsed JSON.
        get: Returns the tensor of a name.
        trust_pickle: Whether to run pickles.
        source: The file, for errors.

    Raises:
        CheckpointError: If there is a pickle and `trust_pickle` is False, or an unknown form.
    """

    def inner(v: Any) -> Any:
        if isinstance(v, list):
            return [inner(x) for x in v]
        if not isinstance(v, dict):
            return v
        tag = next((k for k in v if k.startswith("$")), None)
        if tag is None:
            return {k: inner(x) for k, x in v.items()}
        if tag == "$tensor":
            return get(v[tag])
        if tag == "$pickle":
            return _unpickle(v, trust_pickle, source)
        if tag == "$numpy":
            name, dtype, scalar = v[tag]
            array = get(name).numpy().astype(dtype, copy=False)
            return array[()] if scalar else array
        if tag == "$torch":
            return torch.device(v[tag]) if v["kind"] == "device" else _dtype(v[tag], source)
        if tag not in _READERS:
            raise CheckpointError(
                f"{source} holds a value of the unknown form {tag!r}: it was not written by lightning_hybrid."
            )
        return _READERS[tag](inner(v[tag]))

    return inner(value)


def _encode_mapping(value: Mapping, put: Callable[[Tensor], str], path: str) -> Any:
    tags = {OrderedDict: "$ordered", **dict.fromkeys(twins(AttributeDict), "$attributes")}
    if all(isinstance(k, str) and not k.startswith("$") for k in value):
        plain: Any = {k: encode(v, put, f"{path}.{k}") for k, v in value.items()}
        return {tags[type(value)]: plain} if type(value) in tags else plain
    return {"$items": [[encode(k, put, path), encode(v, put, f"{path}[{k!r}]")] for k, v in value.items()]}


def _pickled(value: Any, path: str) -> Any:
    kind = _qualified(type(value))
    try:
        data = pickle.dumps(value)
    except Exception as error:  # noqa: BLE001 -- pickling runs code of any class, which may raise anything
        warnings.warn(f"A checkpoint leaves out `{path}`: a {kind} cannot be pickled ({error}).", stacklevel=2)
        return None
    return {"$pickle": base64.b64encode(data).decode(), "type": kind, "at": path}


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _unpickle(value: dict, trust: bool, source: str) -> Any:
    if not trust:
        raise CheckpointError(
            f"{source} holds a pickled {value.get('type')} (at `{value.get('at')}`), and unpickling can run any code. "
            "If you trust the file, pass `checkpoints=CheckpointOptions(trust_pickle=True)` to the strategy."
        )
    return pickle.loads(base64.b64decode(value["$pickle"]))


def _dtype(name: str, source: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{source} names {name!r} as a torch.dtype, which it is not.")
    return dtype


_KINDS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    argparse.Namespace: ("$namespace", vars),
    tuple: ("$tuple", list),
    set: ("$set", list),
    frozenset: ("$frozenset", list),
    bytes: ("$bytes", lambda b: base64.b64encode(b).decode()),
    complex: ("$complex", lambda c: [c.real, c.imag]),
    range: ("$range", lambda r: [r.start, r.stop, r.step]),
    slice: ("$slice", lambda s: [s.start, s.stop, s.step]),
    datetime.datetime: ("$datetime", lambda d: d.isoformat()),
    datetime.timedelta: ("$timedelta", lambda d: [d.days, d.seconds, d.microseconds]),
    pathlib.PosixPath: ("$path", str),
    pathlib.WindowsPath: ("$path", str),
    torch.Size: ("$size", list),
}
"""For each type its tag, and the conversion to a plain value."""

_READERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$namespace": lambda d: argparse.Namespace(**d),
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$bytes": base64.b64decode,
    "$complex": lambda c: complex(*c),
    "$range": lambda r: range(*r),
    "$slice": lambda s: slice(*s),
    "$datetime": datetime.datetime.fromisoformat,
    "$timedelta": lambda d: datetime.timedelta(*d),
    "$path": pathlib.Path,
    "$size": torch.Size,
    "$ordered": OrderedDict,
    "$attributes": AttributeDict,
    "$items": lambda pairs: {k: v for k, v in pairs},
}
