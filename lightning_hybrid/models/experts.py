"""Mixture of experts: shared experts for every token, and routed experts chosen per token by a router.

Dims in the suffixes of tensor names: B batch, T time, D model width, N tokens (B times T), E experts, A experts chosen
for a token, J groups of experts, M rows of a grouped matmul (N times A), F inner width of an expert.

References:
    DeepSeek-V3, arXiv:2412.19437, section 2.1.2, whose equations are cited. Our E, A are its N_r, K_r.
    Wang et al., Auxiliary-Loss-Free Load Balancing, arXiv:2408.15664 (balancing by bias).
    DeepSeek-V2, arXiv:2405.04434, section 2.1.2 (group-limited routing).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hybrid.models.config import ExpertsConfig
from lightning_hybrid.models.feed_forward import FeedForward, swiglu

_MULTIPLE = 8
"""Rows of the weights of `torch.nn.functional.grouped_mm` are multiples of 16 bytes, so of 8 numbers in bfloat16."""


class Routing(NamedTuple):
    """Experts and expert weights of each token."""

    scores_NE: Tensor
    """Affinity of each token to each expert, between 0 and 1."""
    index_NA: Tensor
    """Indices of the chosen experts."""
    weights_NA: Tensor
    """Weights of the chosen experts' outputs."""


class Router(nn.Module):
    """Chooses experts by the sigmoid of the token's affinity, plus a bias that balances their loads.

    Args:
        width: Model width, D.
        config: The experts.
    """

    bias: Tensor
    load: Tensor
    sums_over_samples = ("load",)
    """Buffers to which each call adds a sum over its samples: microbatches of a pipeline may be added, too."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        nn.init.normal_(self.weight, std=1 / math.sqrt(width))
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("load", torch.zeros(config.experts), persistent=False)

    def forward(self, x_ND: Tensor) -> Routing:
        """Return the routing of each token, in float32 for any precision of the step."""
        config = self.config
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NE = F.linear(x_ND.float(), self.weight.float()).sigmoid()  # equation 15
        index_NA = self._choose(scores_NE.detach() + self.bias)  # equation 16
        weights_NA = scores_NE.gather(1, index_NA)
        weights_NA = weights_NA / (weights_NA.sum(dim=1, keepdim=True) + 1e-20) * config.scale  # equation 13
        if self.training:
            self.load += F.one_hot(index_NA, config.experts).sum(dim=(0, 1))
        return Routing(scores_NE, index_NA, weights_NA)

    def _choose(self, biased_NE: Tensor) -> Tensor:
        groups, kept = self.config.groups, self.config.chosen_groups
        if kept < groups:
            grouped_NJE = biased_NE.unflatten(1, (groups, -1))
            value_NJ = grouped_NJE.topk(2, dim=-1).values.sum(dim=-1)  # sum of the two best experts
            chosen_NJ = torch.zeros_like(value_NJ).scatter(1, value_NJ.topk(kept, dim=1).indices, 1.0)
            biased_NE = grouped_NJE.masked_fill(chosen_NJ[..., None] == 0, -math.inf).flatten(1)
        return biased_NE.topk(self.config.chosen, dim=1).indices

    @torch.no_grad()
    def balance(self, load_E: Tensor, rate: float) -> None:
        """Update each bias by ``rate``: up for experts below the mean load, down for experts above it.

        Args:
            load_E: Tokens routed to each expert in the step, summed over ranks.
            rate: Update speed, gamma of section 2.1.2.
        """
        self.bias += rate * torch.sign(load_E.mean() - load_E)
        self.load.zero_()


class Experts(nn.Module):
    """SwiGLU experts with fused weights, applied to their tokens by grouped matmuls.

    Args:
        experts: Number of experts, E.
        width: Model width, D.
        hidden: Inner width of each expert, F.

    Raises:
        ValueError: If a width is not a multiple of 8.
    """

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        for name, size in (("width", width), ("hidden", hidden)):
            if size % _MULTIPLE:
                raise ValueError(
                    f"`{name}` must be a multiple of {_MULTIPLE} in a mixture of experts, for the grouped matmul. "
                    f"Got {size}. Use {max(1, round(size / _MULTIPLE)) * _MULTIPLE}."
                )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))

    def forward(self, x_ND: Tensor, index_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """Return ``sum_a weights[n, a] * expert[index[n, a]](x[n])`` for every token n; no token is dropped."""
        chosen = index_NA.shape[1]
        expert_M, order_M = index_NA.flatten().sort(stable=True)
        ends_E = torch.searchsorted(expert_M, torch.arange(1, len(self.down_proj) + 1, device=x_ND.device))
        x_MD = x_ND[order_M // chosen]
        gate_MF, up_MF = _grouped(x_MD, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        y_MD = _grouped(swiglu(gate_MF, up_MF), self.down_proj, ends_E)
        y_MD = y_MD * weights_NA.flatten()[order_M, None].to(y_MD.dtype)
        y_NAD = torch.zeros_like(y_MD).index_copy(0, order_M, y_MD).unflatten(0, (-1, chosen))
        return y_NAD.sum(dim=1)


class MixtureOfExperts(nn.Module):
    """Shared and routed experts (equation 12 without the residual, which the block adds).

    Args:
        width: Model width, D.
        config: The experts.
    """

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(width, config)
        self.experts = Experts(config.experts, width, config.hidden)
        self.shared = FeedForward(width, config.shared * config.hidden) if config.shared else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the update of the residual stream, and the balance loss, a scalar in nats."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND)
        y_BTD = self.experts(x_ND, routing.index_NA, routing.weights_NA).view_as(x_BTD).to(x_BTD.dtype)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, self._balance_loss(routing.scores_NE.view(*x_BTD.shape[:2], -1))

    def _balance_loss(self, scores_BTE: Tensor) -> Tensor:
        """Return the sequence-wise balance loss, equations 17 to 20, averaged over sequences."""
        config = self.config
        if not config.balance_loss or not self.training:
            return scores_BTE.new_zeros(())
        best_BTA = scores_BTE.topk(config.chosen, dim=-1).indices
        share_BE = F.one_hot(best_BTA, config.experts).sum(dim=2).float().mean(dim=1) * config.experts / config.chosen
        probability_BE = (scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)).mean(dim=1)
        return config.balance_loss * (share_BE * probability_BE).sum(dim=1).mean()


def max_violation(load_E: Tensor) -> Tensor:
    """Return MaxVio of Wang et al., equation 4: the maximum load over the mean load, minus 1."""
    return load_E.max() / load_E.mean() - 1


def _grouped(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert, up to its end in ``ends_E``, by its transposed weight: ``(M, F)``."""
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):  # autocast does not cover this operation
        dtype = torch.get_autocast_dtype(device)
        x_MD, weight_EFD = x_MD.to(dtype), weight_EFD.to(dtype)
    return F.grouped_mm(x_MD, weight_EFD.transpose(1, 2), offs=ends_E.to(torch.int32))
