"""Hybrid data- and model-parallel training for any LightningModule, from one Trainer argument.

Importing this package imports neither torch nor Lightning; the first use of a name below does. It hides messages of
Lightning that every rank repeats.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lightning_hybrid.quiet import hide_messages
from lightning_hybrid.registration import register_strategy

if TYPE_CHECKING:
    from lightning_hybrid import callbacks as callbacks
    from lightning_hybrid import data as data
    from lightning_hybrid import models as models
    from lightning_hybrid.checkpoint.options import CheckpointOptions
    from lightning_hybrid.compare_layouts import verify
    from lightning_hybrid.float8 import Float8Precision
    from lightning_hybrid.spec.errors import CheckpointError, NonFiniteError, PartitionError, RankError
    from lightning_hybrid.spec.layout import Layout
    from lightning_hybrid.strategy import HybridStrategy

    __version__: str

__all__ = [
    "CheckpointError",
    "CheckpointOptions",
    "Float8Precision",
    "HybridStrategy",
    "Layout",
    "NonFiniteError",
    "PartitionError",
    "RankError",
    "verify",
]
"""The public API, with `__all__` of the subpackages `callbacks`, `data` and `models`. A name is removed only after a
release in which its use warns."""

_PLACES = {
    "CheckpointError": "spec.errors",
    "CheckpointOptions": "checkpoint.options",
    "Float8Precision": "float8",
    "HybridStrategy": "strategy",
    "Layout": "spec.layout",
    "NonFiniteError": "spec.errors",
    "PartitionError": "spec.errors",
    "RankError": "spec.errors",
    "verify": "compare_layouts",
}
"""The module of each public name."""
_SUBPACKAGES = ("callbacks", "data", "models")


def _load(name: str) -> Any:
    if name == "__version__":
        return metadata.version("lightning-hybrid")
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})


def _make_strategy(layout: str | None = None) -> Any:
    return _load("HybridStrategy")(layout)


if not TYPE_CHECKING:  # a type checker would accept any name
    __getattr__ = _load

hide_messages()
register_strategy(
    "hybrid", _make_strategy, "Replicas, sharding, experts, tensors and a pipeline for any LightningModule"
)
