"""Optimizers and learning rate schedules of the models.

References:
    Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101, algorithm 2.
    DeepSeek-V3, arXiv:2412.19437, section 3.3.3 (moments in bfloat16).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_hybrid.models.config import OptimizerConfig

_BETAS = (0.9, 0.95)
"""Decay rates of AdamW, as in LLaMA, section 2.3, and DeepSeek-V3, section 4.2."""
_FINAL_SHARE = 0.1
"""Final learning rate of the half cosine, as a share of the peak: LLaMA, section 2.3."""


class AdamWBF16(Optimizer):
    """AdamW with both moments in bfloat16: 4 bytes per parameter instead of 8. Arithmetic is in float32.

    Args:
        params: Parameters or groups of them.
        lr: The learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
    """

    moments = torch.bfloat16

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
        self.register_load_state_dict_post_hook(_cast_moments)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            self._step_adamw(parameter, parameter.grad.float(), group)  # type: ignore[union-attr]

    def _step_adamw(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.add_((first / root).to(parameter.dtype), alpha=-group["lr"] / (1 - beta1**step))


def _cast_moments(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq", "momentum"):
            if key in state:
                state[key] = state[key].to(optimizer.moments)  # type: ignore[attr-defined]


class Muon(AdamWBF16):
    """Muon (orthogonalized momentum) for matrices, AdamW for all other parameters, in one optimizer.

    A parameter with three dims is a stack of matrices (experts), each orthogonalized separately. `torch.optim.Muon`
    accepts only matrices. Sharded weights are gathered for their update.

    Groups with ``"matrices": True`` use Muon, the others AdamW; ``momentum`` is the momentum of Muon.

    Reference:
        Jordan et al., Muon, https://kellerjordan.github.io/posts/muon (momentum, Newton-Schulz iteration);
        Liu et al., Muon is Scalable for LLM Training, arXiv:2502.16982, equation 4 (weight decay, scale of the update).
    """

    def __init__(self, params: Iterable[Any], moments: torch.dtype = torch.float32, **options: Any) -> None:
        self.moments = moments
        super().__init__(params, **options)
        for group in self.param_groups:
            group.setdefault("matrices", False)
            group.setdefault("momentum", 0.95)

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if not group["matrices"]:
            super()._step_group(parameters, group)
            return
        stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            direction = self._direction(parameter, parameter.grad.float(), group["momentum"])  # type: ignore[union-attr]
            stacks[direction.shape[-2:]].append((parameter, direction))
        for shape, members in stacks.items():
            stack = torch.cat([direction.reshape(-1, *shape) for _, direction in members])
            counts = [direction[..., 0, 0].numel() for _, direction in members]
            rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # update RMS of AdamW: arXiv:2502.16982, eq. 4
            for (parameter, direction), update in zip(members, orthogonalize(stack).split(counts), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = _laid_out_like(parameter, update.reshape(direction.shape))
                parameter.add_(update.to(parameter.dtype), alpha=-rate)

    def _direction(self, parameter: Tensor, gradient: Tensor, decay: float) -> Tensor:
        """Return the full gradient with Nesterov momentum."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=self.moments)
        momentum = state["momentum"].float().lerp_(gradient, 1 - decay)
        state["momentum"].copy_(momentum)
        direction = gradient.lerp(momentum, decay)
        return direction.full_tensor() if isinstance(direction, DTensor) else direction


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of each matrix near 1 by a quintic Newton-Schulz iteration.

    Args:
        matrices: ``(..., rows, columns)``.
        steps: Iterations.

    Returns:
        Approximately ``U V^T`` of each singular value decomposition ``U S V^T``; singular values are 0.7 to 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # as in Jordan's post: the steepest at zero that stay bounded
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _laid_out_like(parameter: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        mesh, parameter.placements
    )


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return the optimizer of all trainable parameters of a module; weight decay applies to matrices only."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    decaying = [n for n, p in named.items() if p.dim() > 1]
    muon = [n for n in decaying if config.name == "muon" and not any(part in n for part in _ADAMW)]
    groups: list[dict[str, Any]] = [
        {"params": [named[n] for n in decaying if n not in muon], "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if muon:
        groups.append({"params": [named[n] for n in muon], "weight_decay": config.weight_decay, "matrices": True})
    groups = [group for group in groups if group["params"]]
    moments = torch.bfloat16 if config.moments == "bfloat16" else torch.float32
    if config.name == "muon":
        return Muon(groups, moments, lr=config.learning_rate)
    kind = torch.optim.AdamW if config.moments == "float32" else AdamWBF16
    return kind(groups, lr=config.learning_rate, betas=_BETAS)


_ADAMW = ("embedding", "head", "router", "prefix", "aggregator")
"""Name parts of weights that are not linear maps of the residual stream; Muon's author recommends AdamW for them."""


def learning_rate_share(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate of a step as a share of its peak.

    Args:
        step: Optimizer steps taken so far.
        config: Linear warm-up that reaches 1 at its last step, followed by a half cosine to a tenth (LLaMA, section
            2.3), or a constant and a linear decay to zero (warm-up, stable, decay: Hu et
            al., MiniCPM, arXiv:2404.06395, section 4.2).
        total_steps: Total steps of the run.

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


def optimizer_with_schedule(module: nn.Module, config: OptimizerConfig, total_steps: int) -> OptimizerLRSchedulerConfig:
    """Return the result of `configure_optimizers`: `make_optimizer` with the schedule of `learning_rate_share`."""
    optimizer = make_optimizer(module, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, config, total_steps)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
