"""The fingerprint of a verified step: equal for runs of equal code, layout and shapes."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch

from lightning_hybrid.batches import signature
from lightning_hybrid.engine.engine import Engine


def fingerprint(engine: Engine, batch: Any) -> str:
    """Returns a hash of the code of all modules, the layout with its options, the precision and the batch's shapes."""
    plan, root = engine.plan, engine.root
    parts: list[Any] = [torch.__version__, engine.run.precision.precision, signature(batch), engine.runner.microbatches]
    parts += [plan.layout, plan.schedule, plan.gradient_sync, plan.recompute, plan.compile, plan.tensor_plan]
    parts += [root.trainer.accumulate_grad_batches, [(n, tuple(p.shape)) for n, p in plan.model.parameters.items()]]
    classes = {base for module in root.modules() for base in type(module).__mro__}
    parts += sorted({_source(kind) for kind in classes if not kind.__module__.startswith(("torch.", "builtins"))})
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _source(kind: type) -> str:
    """Returns a hash of the file that defines a class, or the source of a class that no file defines."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        pass
    try:
        return inspect.getsource(kind)  # of a notebook
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"
