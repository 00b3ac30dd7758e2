"""Normalization with the statistics of the global batch: replicas share them, as if one process had all samples.

What is replaced is the function that computes, not the `forward` of modules, which may do more (`timm`'s
`BatchNormAct2d` has the activation inside), nor is it only modules that call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lightning_hybrid._torch_private import BatchNorm, InstanceNorm, in_backward, sum_over_group
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.launch.mentions import mentions
from lightning_hybrid.patching import Patches
from lightning_hybrid.spec.errors import PartitionError

_HALF = (torch.float16, torch.bfloat16)


def has_batch_norm(root: nn.Module) -> bool:
    """Returns True if a step of `root` depends on all samples of a batch: by normalization, or by `all_gather`."""
    norms = any(
        isinstance(m, BatchNorm) or (isinstance(m, InstanceNorm) and m.track_running_stats) for m in root.modules()
    )
    return norms or mentions(root.modules(), "batch_norm") or mentions([root], "all_gather")


def normalizes_by_batch_only(root: nn.Module) -> bool:
    """Returns True if a submodule of `root` normalizes by statistics of the batch, even in evaluation mode."""
    others = [m for m in root.modules() if not isinstance(m, BatchNorm)]
    return mentions(others, "batch_norm") or any(
        isinstance(m, BatchNorm) and not m.track_running_stats for m in root.modules()
    )


def plain_sync_batch_norms(root: nn.Module) -> Patches:
    """Returns patches with which `SyncBatchNorm` does what `BatchNorm` does.

    It has a collective of its own over all ranks, and runs on GPUs only. `BatchStatistics` replaces that.

    Raises:
        PartitionError: If a subclass of `SyncBatchNorm` has its own `forward`.
    """
    patches = Patches()
    for name, module in root.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            if type(module).forward is not nn.SyncBatchNorm.forward:
                raise PartitionError(
                    f"`layout`: {type(module).__name__} (`{name}`) derives from `SyncBatchNorm` and has its own "
                    "`forward`, so its statistics would be those of all ranks, also of `tp` and `pp`. Derive it from "
                    "`BatchNorm2d`: statistics are those of all replicas anyway."
                )
            patches.add(module, forward=BatchNorm.forward.__get__(module))
    return patches


class BatchStatistics:
    """The statistics of the samples of all replicas, in place of those of one replica.

    Args:
        group: One rank of each replica.
        padding: Returns True while the samples of this replica do not count.
        alone: Returns True while replicas run steps independently.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        padding: Callable[[], bool] = lambda: False,
        alone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._group, self._padding, self._alone = group, padding, alone
        self._in_step = 0
        self._batch_norm, self._instance_norm = torch.batch_norm, torch.instance_norm
        self._functional = functional.batch_norm

    def patch(self, patches: Patches) -> None:
        """Adds to `patches` what makes the functions of torch use the statistics of all replicas."""
        patches.add(torch, batch_norm=self.batch_norm, instance_norm=self.instance_norm)
        patches.add(functional, batch_norm=self.functional_batch_norm)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Shares statistics in the context, which is a step, and in its backward pass."""
        self._in_step += 1
        try:
            yield
        finally:
            self._in_step -= 1

    def _shares(self, tensor: Tensor) -> bool:
        return (self._in_step > 0 or in_backward()) and not isinstance(tensor, Ghost) and not self._alone()

    def functional_batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Replaces `torch.nn.functional.batch_norm`, which refuses a single sample, although others may have more."""
        if training and self._shares(input):
            return self._normalized(input, weight, bias, running_mean, running_var, momentum, eps)
        return self._functional(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def batch_norm(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        """Replaces `torch.batch_norm`."""
        if training and self._shares(input):
            return self._normalized(input, weight, bias, running_mean, running_var, momentum, eps)
        return self._batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)

    def _normalized(
        self,
        input_NC: Tensor,  # noqa: N803 -- N samples, C channels, then any spatial dimensions
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Returns the normalized samples of this replica.

        The two-pass form, mean first and then the mean squared deviation, keeps the rounding of one process.

        Reference: Ioffe and Szegedy, 2015, Algorithm 1, with the minibatch taken over all replicas.
        """
        x_NC = input_NC.float() if input_NC.dtype in _HALF else input_NC
        dims = [d for d in range(x_NC.ndim) if d != 1]
        shape = [1, -1] + [1] * (x_NC.ndim - 2)
        counts = 0.0 if self._padding() else 1.0
        size = torch.tensor(counts * (x_NC.numel() // x_NC.shape[1]), device=x_NC.device)
        dist.all_reduce(size, group=self._group)
        mean_C = sum_over_group(x_NC.sum(dims) * counts, self._group) / size
        centred_NC = x_NC - mean_C.view(shape)
        variance_C = sum_over_group(centred_NC.square().sum(dims) * counts, self._group) / size
        with torch.no_grad():
            unbiased_C = variance_C.detach() * size / (size - 1).clamp(min=1)
            for running, current in ((running_mean, mean_C.detach()), (running_var, unbiased_C)):
                if running is not None:
                    running.lerp_(current.to(running.dtype), momentum)
        out = centred_NC * torch.rsqrt(variance_C + eps).view(shape)
        out = out if weight is None else out * weight.view(shape)
        out = out if bias is None else out + bias.view(shape)
        return out.to(input_NC.dtype)

    def instance_norm(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        """Replaces `torch.instance_norm`, whose running statistics are means over the samples."""
        running = [r for r in (running_mean, running_var) if r is not None]
        out = self._instance_norm(
            input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
        )
        if running and use_input_stats and self._shares(input):
            samples = 0.0 if self._padding() else float(input.shape[0])
            with torch.no_grad():
                sums = torch.cat(
                    [*(r.double() * samples for r in running), running[0].new_full((1,), samples).double()]
                )
                dist.all_reduce(sums, group=self._group)
                means = (sums[:-1] / sums[-1]).split([len(r) for r in running])
                for tensor, mean in zip(running, means, strict=True):
                    tensor.copy_(mean)
        return out
