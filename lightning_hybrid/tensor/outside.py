"""Plans of single modules: embeddings, heads, `nn.MultiheadAttention`, convolutions; verified numerically."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_hybrid._torch_private import own_parameters
from lightning_hybrid.spec.tensor_plan import ShardedParameter
from lightning_hybrid.tensor.numbers import Numbers, make_numbers, probing, shadowed
from lightning_hybrid.tensor.probe import FORWARD_ERRORS, linear_dims
from lightning_hybrid.tensor.scopes import part_of

Division = dict[str, ShardedParameter]
"""How the parameters of one module are divided, by relative name."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROBE_WIDTH = 12
"""Smallest spatial size of the input on which a convolution is verified; larger for larger kernels."""


class NotDivisible(Exception):
    """A module cannot be divided; the message is the reason."""


@dataclass(frozen=True)
class Single:
    """The division of one module."""

    kind: str
    """`"embedding"`, `"gathered"` or `"attention"`."""
    parameters: Division


def divide_embedding(module: nn.Embedding, ranks: int) -> Single:
    """Divides an embedding by rows: each rank looks up its part of the vocabulary, and the results are summed.

    Raises:
        NotDivisible: If the embedding cannot be divided.
    """
    if module.num_embeddings % ranks:
        raise NotDivisible(f"its {module.num_embeddings} rows are not divisible by {ranks}")
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise NotDivisible("`max_norm`, `sparse` and `scale_grad_by_freq` need the whole table")
    divided = {"weight": ShardedParameter(dim=0, size=module.num_embeddings)}
    length = module.num_embeddings // ranks
    ids = torch.arange(module.num_embeddings)
    if getattr(module.forward, "__func__", None) is nn.Embedding.forward:
        # some rows of each part: the results for all would take the memory of the table, once for every rank
        ids = torch.cat([part[:: max(length - 1, 1)] for part in ids.split(length)])
    ids = ids[None]

    def to_local(rank: int, call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        foreign = (ids < rank * length) | (ids >= (rank + 1) * length)
        return call((ids - rank * length).masked_fill(foreign, 0)).masked_fill(foreign[..., None], 0.0)

    _verify(module, divided, ranks, lambda call: call(ids), to_local, lambda parts: torch.stack(parts).sum(0))
    return Single("embedding", divided)


def divide_gathered(module: nn.Module, ranks: int) -> Single:
    """Divides a linear, or a convolution without groups, by output channels; the outputs are gathered.

    Raises:
        NotDivisible: If the module cannot be divided.
    """
    dims = linear_dims(module)
    if dims is not None:
        dim, channels = dims[0], -1
        given = torch.randn(3, _shape(module, "weight")[dims[1]], generator=torch.Generator().manual_seed(0))
    elif (
        isinstance(module, _CONVOLUTIONS)
        and module.groups == 1
        and "weight" in {*own_parameters(module), *vars(module)}
    ):
        dim, channels = 0, 1
        reach = [(k - 1) * d + s for k, d, s in zip(module.kernel_size, module.dilation, module.stride, strict=True)]
        shape = (2, module.in_channels, *(max(r, _PROBE_WIDTH) for r in reach))
        given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    else:
        raise NotDivisible("only linears and convolutions without groups have independent output channels")
    size = _shape(module, "weight")[dim]
    if size % ranks:
        raise NotDivisible(f"its {size} output channels are not divisible by {ranks}")
    divided = {"weight": ShardedParameter(dim=dim, size=size)}
    if module.bias is not None:
        divided["bias"] = ShardedParameter(dim=0, size=size)
    attributes = [(module, "nf", size // ranks)] if "nf" in module.__dict__ else []
    _verify(
        module, divided, ranks, lambda call: call(given), lambda _, call: call(given),
        lambda parts: torch.cat(parts, channels), attributes,
    )  # fmt: skip
    return Single("gathered", divided)


def divide_attention(module: nn.MultiheadAttention, ranks: int) -> Single:
    """Divides an attention by heads; its forward is `DividedAttention` in `attention`.

    Raises:
        NotDivisible: If the attention cannot be divided.
    """
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise NotDivisible("its forward is not that of `nn.MultiheadAttention`")
    if module.num_heads % ranks:
        raise NotDivisible(f"its {module.num_heads} heads are not divisible by {ranks}")
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise NotDivisible("`add_bias_kv` and `add_zero_attn` are not supported")
    width = module.embed_dim
    part = width // ranks
    fused = tuple(s * width + r * part + i for r in range(ranks) for s in range(3) for i in range(part))
    divided: Division = {"out_proj.weight": ShardedParameter(dim=1, size=width)}
    if module.in_proj_weight is not None:
        divided["in_proj_weight"] = ShardedParameter(dim=0, size=3 * width, order=fused)
    else:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            divided[name] = ShardedParameter(dim=0, size=width)
    if module.in_proj_bias is not None:
        divided["in_proj_bias"] = ShardedParameter(dim=0, size=3 * width, order=fused)
    return Single("attention", divided)


def _shape(module: nn.Module, name: str) -> torch.Size:
    return getattr(module, name).shape


def _verify(
    module: nn.Module,
    divided: Division,
    ranks: int,
    whole: Callable[[Callable], torch.Tensor],
    to_local: Callable[[int, Callable], torch.Tensor],
    join: Callable[[list[torch.Tensor]], torch.Tensor],
    attributes: list[tuple[nn.Module, str, int]] | None = None,
) -> None:
    """Runs `module` whole and as every rank, and compares the results.

    Raises:
        NotDivisible: If the joined results of the ranks differ from that of the whole.
    """
    with probing(module):
        numbers = make_numbers(module, (), {}, seed=5)
        try:
            with shadowed(_weights(numbers, divided, None, ranks)):
                expected = whole(module)
            parts = []
            for rank in range(ranks):
                with shadowed([*_weights(numbers, divided, rank, ranks), *(attributes or [])]):
                    parts.append(to_local(rank, module))
            joined = join(parts)
        except FORWARD_ERRORS as error:
            raise NotDivisible(f"it does not run on a part: {type(error).__name__}: {error}") from error
    if joined.shape != expected.shape or not torch.allclose(joined, expected, rtol=1e-4, atol=1e-4):
        raise NotDivisible("its joined parts differ from the whole")


def _weights(numbers: Numbers, divided: Division, rank: int | None, ranks: int) -> list:
    to_local = {
        name: part_of(value, divided[name], rank, ranks) if rank is not None and name in divided else value
        for name, value in numbers.parameters.items()
    }
    entries = numbers.entries(to_local, numbers.buffers)
    if isinstance(numbers.module, nn.Embedding) and rank is not None:
        # `padding_idx` only stops the gradient of a row; it does not change the forward.
        entries.append((numbers.module, "padding_idx", None))
    return entries
