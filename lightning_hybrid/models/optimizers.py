"""Optimizers and learning rates of the models here.

References:
    Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101, algorithm 2.
    DeepSeek-V3, arXiv:2412.19437, section 3.3.3 (moments in bfloat16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hybrid.models.config import OptimizerConfig

_BETAS = (0.9, 0.95)
"""AdamW's decay rates, as LLaMA, section 2.3, and DeepSeek-V3, section 4.2."""
_FINAL_SHARE = 0.1
"""The half cosine ends at this share of the peak, as LLaMA, section 2.3."""


class AdamWBF16(Optimizer):
    """AdamW that keeps both moments in bfloat16: 4 bytes a weight instead of 8. Arithmetic is in float32.

    Args:
        params: Parameters or groups of them.
        lr: The learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Share of a weight, times the learning rate, that is taken off in a step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = _BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        # `Optimizer.load_state_dict` casts all state to the dtype of the parameter
        self.register_load_state_dict_post_hook(_moments_to_bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        gradient = gradient.float()
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        parameter.add_((first / root).to(parameter.dtype), alpha=-group["lr"] / (1 - beta1**step))


def _moments_to_bfloat16(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key] = state[key].to(torch.bfloat16)


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer of all parameters of a module that are trained; only matrices decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.moments == "float32" else AdamWBF16
    return kind([group for group in groups if group["params"]], lr=config.learning_rate, betas=_BETAS)


def learning_rate_share(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate of a step as a share of its peak.

    Args:
        step: Optimizer steps taken so far.
        config: The warm-up, in which it rises linearly and reaches 1 at the last step, and what follows: a half cosine
            to a tenth (LLaMA, section 2.2), or a constant and a linear decay to zero (warm-up, stable, decay: Hu et
            al., MiniCPM, arXiv:2404.06395, section 4.2).
        total_steps: Steps of the whole run.

    Returns:
        A share between 0 and 1.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "stable":
        decay_steps = max(1, round(total_steps * config.decay_share))
        return min(1.0, max(0, total_steps - step) / decay_steps)
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
