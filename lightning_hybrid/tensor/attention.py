"""The forward of `nn.MultiheadAttention` with heads divided over the ranks; arguments and results are torch's.

Shapes: L query length, S key length, B batch, E width, H heads, h = H / ranks heads on this rank, D = E / H.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lightning_hybrid.tensor.collectives import copy_to_ranks, gather_from_ranks, sum_over_ranks
from lightning_hybrid.tensor.scopes import Scopes


class DividedAttention:
    """The forward of one module, whose weights are this rank's parts while it runs."""

    def __init__(self, module: nn.MultiheadAttention, group: dist.ProcessGroup, scopes: Scopes) -> None:
        self.module, self.group, self.scopes = module, group, scopes
        self.heads = module.num_heads // group.size()

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes what `nn.MultiheadAttention.forward` computes."""
        if is_causal and attn_mask is None:
            raise RuntimeError("`is_causal` needs `attn_mask`, as in `nn.MultiheadAttention`.")
        batched = query.dim() == 3
        transposed = batched and not self.module.batch_first
        copies = {id(t): (t, copy_to_ranks(t, self.group)) for t in (query, key, value)}
        query_BLE, key_BSE, value_BSE = (
            copies[id(t)][1].transpose(0, 1) if transposed else copies[id(t)][1] for t in (query, key, value)
        )
        if not batched:
            query_BLE, key_BSE, value_BSE = (t.unsqueeze(0) for t in (query_BLE, key_BSE, value_BSE))
        q_BhLD, k_BhSD, v_BhSD = self._project(query_BLE, key_BSE, value_BSE, key is query, value is key)
        self.scopes.enter_region("attention")
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q_BhLD, k_BhSD.shape[-2])
        dropout = self.module.dropout if self.module.training else 0.0
        weights_BhLS = None
        if need_weights:
            scores_BhLS = (q_BhLD * q_BhLD.shape[-1] ** -0.5) @ k_BhSD.transpose(-2, -1)
            weights_BhLS = torch.softmax(scores_BhLS if mask is None else scores_BhLS + mask, dim=-1)
            weights_BhLS = F.dropout(weights_BhLS, dropout) if dropout > 0.0 else weights_BhLS
            out_BhLD = weights_BhLS @ v_BhSD
        else:
            out_BhLD = F.scaled_dot_product_attention(
                q_BhLD, k_BhSD, v_BhSD, attn_mask=mask, dropout_p=dropout, is_causal=causal
            )
        self.scopes.leave_region()
        out = self._close(out_BhLD)
        weights = self._weights(weights_BhLS, average_attn_weights)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if transposed else out, weights

    def _project(self, query: Any, key: Any, value: Any, key_is_query: bool, value_is_key: bool) -> list[torch.Tensor]:
        """Projects [B, L or S, E] each to [B, h, L or S, D]."""
        module = self.module
        bias = module.in_proj_bias
        if module.in_proj_weight is not None and key_is_query and value_is_key:
            parts = list(F.linear(query, module.in_proj_weight, bias).chunk(3, -1))
        else:
            weights = (
                (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
                if module.in_proj_weight is None
                else module.in_proj_weight.chunk(3)
            )
            biases = bias.chunk(3) if bias is not None else (None, None, None)
            given = (query, key, value)
            parts = [F.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True)]
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts]

    def _mask(
        self, attn_mask: torch.Tensor | None, padding: torch.Tensor | None, query: torch.Tensor, keys: int
    ) -> torch.Tensor | None:
        """Joins both masks to one additive mask, broadcastable to [B, h, L, S]."""
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, query.dtype)
            if total.dim() == 3:  # [B * H, L, S]
                first = self.group.rank() * self.heads
                total = total.unflatten(0, (-1, self.module.num_heads))[:, first : first + self.heads]
        if padding is not None:
            padded = _additive(padding, query.dtype).view(-1, 1, 1, keys)
            total = padded if total is None else total + padded
        return total

    def _close(self, out_BhLD: torch.Tensor) -> Any:
        """Projects to [B, L, E] and sums over the ranks."""
        projection = self.module.out_proj
        joined = out_BhLD.transpose(1, 2).flatten(-2)
        return sum_over_ranks(F.linear(joined, projection.weight, projection.bias), self.group)

    def _weights(self, weights: torch.Tensor | None, average: bool) -> Any:
        if weights is None:
            return None
        if average:
            return sum_over_ranks(weights.sum(1) / self.module.num_heads, self.group)
        return gather_from_ranks(weights, 1, self.group)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
