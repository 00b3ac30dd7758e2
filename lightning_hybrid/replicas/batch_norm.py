"""BatchNorm over the global batch: replicas normalize with common statistics, as one process would."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid._torch_private import BatchNorm, check_input_dim, sum_over_group


def has_batch_norm(root: nn.Module) -> bool:
    """Returns True if a submodule of `root` normalizes with the statistics of the batch."""
    return any(isinstance(m, BatchNorm) for m in root.modules())


def global_batch_norm(
    module: BatchNorm, group: dist.ProcessGroup, padding: Callable[[], bool] = lambda: False
) -> Callable[[Tensor], Tensor]:
    """Returns a `forward` for `module` with the statistics of all replicas together.

    While `padding()` is True, samples of this replica do not count in the statistics.

    The two-pass form, mean first and then the mean squared deviation, keeps the rounding of one process.

    Reference: Ioffe and Szegedy, 2015, Algorithm 1, with the minibatch taken over all replicas.
    """
    original = module.forward

    def forward(x_NC: Tensor) -> Tensor:  # noqa: N803 -- N samples, C channels, then any spatial dimensions
        if not module.training:
            return original(x_NC)
        check_input_dim(module, x_NC)
        dims = [d for d in range(x_NC.ndim) if d != 1]
        shape = [1, -1] + [1] * (x_NC.ndim - 2)
        counts = 0.0 if padding() else 1.0
        size = torch.tensor(counts * (x_NC.numel() // x_NC.shape[1]), device=x_NC.device)
        dist.all_reduce(size, group=group)
        mean_C = sum_over_group(x_NC.sum(dims) * counts, group) / size
        centred_NC = x_NC - mean_C.view(shape)
        variance_C = sum_over_group(centred_NC.square().sum(dims) * counts, group) / size
        _update_running(module, mean_C.detach(), variance_C.detach() * size / (size - 1).clamp(min=1))
        out = centred_NC * torch.rsqrt(variance_C + module.eps).view(shape)
        return out * module.weight.view(shape) + module.bias.view(shape) if module.affine else out

    return forward


def _update_running(module: BatchNorm, mean_C: Tensor, variance_C: Tensor) -> None:  # noqa: N803
    if not module.track_running_stats or module.running_mean is None or module.running_var is None:
        return
    with torch.no_grad():
        factor = module.momentum
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            factor = 1.0 / float(module.num_batches_tracked) if factor is None else factor
        module.running_mean.lerp_(mean_C.to(module.running_mean.dtype), factor or 0.0)
        module.running_var.lerp_(variance_C.to(module.running_var.dtype), factor or 0.0)
