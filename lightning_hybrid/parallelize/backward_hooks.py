"""Refuses backward hooks of modules whose parts may be on several stages."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_hybrid._torch_private import backward_hooks_of, location_of
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout


def check_backward_hooks(root: nn.Module, layout: Layout, units: Collection[str]) -> None:
    """Refuses a backward hook of a module that contains units, which needs the gradients of its inputs and outputs.

    An element of a stack is a unit if it has its hook before the run begins.

    Args:
        root: The LightningModule.
        layout: The layout.
        units: Names of the units.

    Raises:
        PartitionError: If there is one and `layout` has stages.
    """
    if layout.pp == 1:
        return
    for name, module in root.named_modules():
        hooks = [] if isinstance(module, nn.ModuleList | nn.ModuleDict) else backward_hooks_of(module)
        inside = [unit for unit in units if unit.startswith(f"{name}." if name else "")]
        if hooks and inside:
            raise PartitionError(
                f"`layout='{layout}'` divides `{name or type(root).__name__}` into stages, and it has a backward hook "
                f"({location_of(hooks[0])}), which needs the gradients of its inputs and outputs on one rank. Register "
                f"the hook in `__init__`, on modules inside, such as `{inside[0]}`, or use a layout without `pp`, such "
                f"as '{layout.moved('pp', 'dp')}'."
            )
