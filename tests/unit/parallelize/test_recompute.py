"""What is computed again, and what is kept."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hybrid.models import ExpertsConfig, LatentConfig, TransformerConfig
from lightning_hybrid.models.attention import rotary_table
from lightning_hybrid.models.transformer import Block
from lightning_hybrid.parallelize.recompute import recomputed

CONFIG = TransformerConfig(
    width=64,
    heads=2,
    latent=LatentConfig(key_value=16, rotary=8, head=24, value=32),
    experts=ExpertsConfig(experts=4, chosen=2, hidden=32),
)


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def run(how: Any) -> tuple[Counter[str], int, list[torch.Tensor]]:
    """Operations of the backward pass, bytes kept for it, gradients."""
    torch.manual_seed(0)
    block, x = Block(CONFIG, experts=True), torch.randn(2, 16, 64, requires_grad=True)
    cos, sin = rotary_table(16, 8)
    call = block if how is None else recomputed(block, how)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = call(x, cos, sin)
    with Operations() as operations:
        y.square().sum().backward()
    return operations.counts, sum(kept.values()), [x.grad, *(p.grad for p in block.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("how", ["selective", "full"])
def test_gradients_are_the_same(how: str) -> None:
    for found, expected in zip(run(how)[2], run(None)[2], strict=True):
        assert torch.equal(found, expected)


def test_full_keeps_nothing_and_computes_everything_again() -> None:
    (plain, _, _), (full, _, _) = run(None), run("full")
    assert full["_grouped_mm"] == plain["_grouped_mm"] + 2
    assert full["silu"] == 2  # of the shared expert and of the routed ones
    assert plain["silu"] == 0


def test_selective_computes_norms_swiglu_and_the_latent_up_projection_again() -> None:
    (plain, kept, _), (selective, _, _) = run(None), run("selective")
    assert kept > 0
    assert selective["_grouped_mm"] == plain["_grouped_mm"]
    assert selective["mm"] == plain["mm"] + 1  # `kv_up_proj`, over an inner dim of 16
    assert selective["silu"] == 2
    assert selective["_fused_rms_norm"] + selective["rsqrt"] == 3  # of the block and of the latent


def test_nothing_is_computed_again_without_gradients() -> None:
    calls = []
    call = recomputed(lambda x: calls.append(1) or x, "full")
    with torch.no_grad():
        call(torch.ones(1))
    assert calls == [1]
