"""Checks that the `tp` axis divides the number of attention heads."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "encoder_attention_heads")
"""Names of the number of query heads in torch, transformers and most hand-written models."""


def attention_heads(root: nn.Module) -> dict[str, int]:
    """Returns the number of heads of every module whose class name contains "attention", where it is an attribute."""
    heads = {}
    for name, module in root.named_modules():
        if "attention" not in type(module).__name__.lower():
            continue
        for owner in (module, getattr(module, "config", None)):
            counts = [v for key in _ATTRIBUTES if isinstance(v := getattr(owner, key, None), int) and v > 0]
            if counts:
                heads[name] = counts[0]
                break
    return heads


def check_heads(root: nn.Module, layout: Layout, overrides: Mapping[str, str] | None) -> None:
    """Refuses a `tp` that does not divide the heads of any attention: most of the model would silently stay whole.

    Raises:
        PartitionError: If `layout.tp` divides the heads of no attention that `overrides` does not keep replicated.
    """
    kept = [pattern for pattern, choice in (overrides or {}).items() if choice == "replicate"]
    heads = {n: c for n, c in attention_heads(root).items() if not any(fnmatchcase(n, p) for p in kept)}
    if not heads or any(count % layout.tp == 0 for count in heads.values()):
        return
    name, count = next(iter(heads.items()))
    sizes = [d for d in range(2, count + 1) if count % d == 0]
    others, sharded = layout.moved("tp", "dp"), layout.moved("tp", "fsdp")
    pattern = f"*{name.rpartition('.')[2]}"
    raise PartitionError(
        f"`layout='{layout}'` has `tp={layout.tp}`, which must divide the number of attention heads. `{name}` has "
        f"{count} heads. Use a `tp` of {' or '.join(map(str, sizes))}, a layout such as '{others}' or '{sharded}', or "
        f"`tensor_plan={{'{pattern}': 'replicate'}}` to keep the attention whole on every rank."
    )
