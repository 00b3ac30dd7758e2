"""Tensors that the user puts into a checkpoint: copies of weights, averages, importance of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from lightning_hybrid._torch_private import tree_flatten, tree_unflatten
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.spec.errors import CheckpointError


def whole_values(engine: Engine, document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `document` with whole tensors in place of parts, and with values of other pipeline stages. Collective.

    Raises:
        CheckpointError: On all ranks, if the pipeline stages have put different values into the document.
    """
    leaves, spec = tree_flatten(dict(document))
    leaves = [engine.full_tensor(leaf) if isinstance(leaf, DTensor) else leaf for leaf in leaves]
    if engine.plan.layout.pp > 1:
        known = gather_objects((len(leaves), {i for i, leaf in enumerate(leaves) if isinstance(leaf, Ghost)}))
        wanted = set().union(*(lacking for _, lacking in known))
        if wanted:
            if len({count for count, _ in known}) > 1:
                raise CheckpointError(
                    "Pipeline stages have put different numbers of values into the checkpoint. In `on_save_checkpoint` "
                    "and in `state_dict` of callbacks, save the same names on every rank."
                )
            held = {i: leaves[i].detach().cpu() for i in wanted if not isinstance(leaves[i], Ghost)}
            for i, value in {i: v for values in gather_objects(held) for i, v in values.items()}.items():
                leaves[i] = value
    return tree_unflatten(leaves, spec)
