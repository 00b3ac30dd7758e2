"""The fingerprint of a verified step: equal for runs of equal code, layout and shapes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from lightning_hybrid.batches import signature
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.spec.code import code_hash, file_hash, module_of


def fingerprint(engine: Engine, batch: Any) -> str:
    """Returns a hash of the code of all modules, the layout with its options, the precision and the batch's shapes."""
    plan, root = engine.plan, engine.root
    parts: list[Any] = [torch.__version__, engine.run.precision.precision, signature(batch), engine.runner.microbatches]
    parts += [plan.layout, plan.schedule, plan.gradient_sync, plan.recompute, plan.compile, plan.tensor_plan]
    parts += [root.trainer.accumulate_grad_batches, [(n, tuple(p.shape)) for n, p in plan.model.parameters.items()]]
    classes = {base for module in root.modules() for base in type(module).__mro__}
    users = [kind for kind in classes if not module_of(kind).startswith(("torch.", "builtins"))]
    parts += sorted({file_hash(kind) or code_hash(kind) for kind in users})
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
