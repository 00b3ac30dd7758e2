"""Gradient synchronization: the mean over replicas, and the sum over stages that share a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_hybrid._lightning_private import is_overridden
from lightning_hybrid._torch_private import after_this_backward, foreach_copy
from lightning_hybrid.collectives import to_local
from lightning_hybrid.replicas.reduction import Exact, Finish, Reduction
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

BUCKET_BYTES = 25 * 1024 * 1024
"""The bucket size of DistributedDataParallel (Li et al., 2020, section 4.2: 25 MB is robust across models)."""

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


class _Bucket:
    """Gradients reduced together, as views into one flat buffer; the last elements flag the used parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        shards = [to_local(p.detach()) for p in parameters]
        total = sum(s.numel() for s in shards)
        self.flat = torch.zeros(total + len(parameters), dtype=shards[0].dtype, device=shards[0].device)
        self.flags = self.flat[total:]
        self.views: list[Tensor] = []
        offset = 0
        for shard in shards:
            self.views.append(self.flat[offset : offset + shard.numel()].view(shard.shape))
            offset += shard.numel()
        self.ready = 0
        self.finish: Finish | None = None

    def launch(self, group: dist.ProcessGroup, scale: float, reduction: Reduction) -> None:
        missing = [i for i, p in enumerate(self.parameters) if p.grad is None]
        present = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        self.flags.fill_(1.0)
        for i in missing:
            self.views[i].zero_()
            self.flags[i] = 0.0
        grads = [to_local(self.parameters[i].grad) for i in present]  # type: ignore[arg-type]
        copies = [
            (self.views[i], g) for i, g in zip(present, grads, strict=True) if g.data_ptr() != self.views[i].data_ptr()
        ]
        if copies:
            foreach_copy([v for v, _ in copies], [g for _, g in copies])
        self.flat.mul_(scale)
        if dist.get_world_size(group) > 1:
            real = torch.view_as_real(self.flat).view(-1) if self.flat.is_complex() else self.flat
            self.finish = reduction.begin(real, group)

    def collect(self) -> None:
        if self.finish is not None:
            self.finish()
        self.finish, self.ready = None, 0
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                if self.flags[i].item() == 0.0:
                    continue  # used on no replica
                parameter.grad = torch.zeros_like(parameter)
            if isinstance(parameter.grad, DTensor):
                to_local(parameter.grad).copy_(self.views[i])
            else:
                parameter.grad = self.views[i]


class ReplicaReducer:
    """Averages gradients over replicas in buckets, overlapping with the backward pass.

    Unlike DistributedDataParallel, supports DTensor parameters, parameters that some replicas do not use, and gradients
    accumulated by a pipeline schedule; buckets are reduced in a fixed order, equal on all replicas.

    Args:
        parameters: This rank's trainable parameters, in the order of the forward pass.
        group: The ranks that hold the same parameters.
        replicas: The divisor of the mean. Larger than the group if a rank's gradients are sums over several replicas,
            as those of experts.
        reduction: The kind of all-reduce; None: `Exact()`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        replicas: int,
        reduction: Reduction | None = None,
    ) -> None:
        self.group, self.enabled, self._reduction = group, True, reduction or Exact()
        self.on_complete: Callable[[], None] = lambda: None
        """Called when this rank has all gradients, before the wait for other ranks."""
        self.waiting: Callable[[], AbstractContextManager] = nullcontext
        """Surrounds the wait for other ranks."""
        self._scale = 1.0 / replicas
        self._buckets = [_Bucket(chunk) for chunk in in_buckets(list(parameters)[::-1])]
        self._bucket_of = {p: b for b in self._buckets for p in b.parameters}
        self._next = 0
        self._queued = self._finished = self._waits = False
        self._hooks: list[RemovableHandle] = []
        self._divides_again = dist.get_world_size(group) != replicas
        """True if reducing a mean again does not give the same mean."""
        self._reduced: dict[nn.Parameter, Tensor | None] = {}
        """The gradients after the last reduction, which later backward passes add to."""
        self._earlier: dict[nn.Parameter, Tensor] = {}
        """Reduced gradients, to which those of the running backward pass are added at its end."""

    def overlap(self) -> None:
        """Overlaps with the backward pass: reduces each bucket as soon as its gradients are complete."""
        for parameter in self._bucket_of:
            trained = parameter.requires_grad  # a step with manual optimization may have frozen it for a while
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))  # type: ignore[attr-defined]
            parameter.requires_grad_(trained)

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends for the gradients of one step."""
        ranks = dist.get_world_size(self.group)
        return sum(self._reduction.sent_bytes(len(b.flat), b.flat.element_size(), ranks) for b in self._buckets)

    def release(self) -> None:
        """Removes the hooks, before another reducer is used."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin_backward(self, overlap: bool) -> None:
        """Called before a backward pass.

        Args:
            overlap: False to reduce only afterwards: other collectives of the backward pass, as those of `fully_shard`,
                could meet these where replicas use different parameters.
        """
        self._finished, self._waits = False, not overlap
        if self.enabled and self._divides_again:
            self._set_reduced_aside()

    def _set_reduced_aside(self) -> None:
        for parameter in self._bucket_of:
            gradient = parameter.grad
            if gradient is not None and gradient is self._reduced.get(parameter):
                self._earlier[parameter] = gradient.clone()  # whose memory is that of a bucket
                parameter.grad = None

    def end_backward(self) -> None:
        """Reduces after a backward pass that has reached no parameter on this replica: others may have gradients."""
        self._waits = False
        if not self._finished:
            self.finish()

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self.enabled or self._waits:
            return
        if not self._queued:
            self._queued = True
            after_this_backward(self.finish)
        self._bucket_of[parameter].ready += 1  # type: ignore[index]
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.ready < len(bucket.parameters):
                break
            bucket.launch(self.group, self._scale, self._reduction)
            self._next += 1

    def finish(self) -> None:
        """Reduces the remaining buckets and waits; then every `.grad` is the mean over the replicas."""
        if not self.enabled:
            return
        self.on_complete()
        for bucket in self._buckets[self._next :]:
            bucket.launch(self.group, self._scale, self._reduction)
        self._next, self._queued, self._finished = 0, False, True
        with self.waiting():
            for bucket in self._buckets:
                bucket.collect()
        for parameter, gradient in self._earlier.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._earlier.clear()
        if self._divides_again:
            self._reduced = {p: p.grad for p in self._bucket_of}


def in_buckets(tensors: Iterable[AnyTensor]) -> list[list[AnyTensor]]:
    """Returns `tensors` in lists of one dtype and device, with at most `BUCKET_BYTES` each or one tensor."""
    buckets: list[list[AnyTensor]] = []
    sizes: dict[tuple, int] = {}
    open_bucket: dict[tuple, list[AnyTensor]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        size = tensor.numel() * tensor.element_size()
        if kind not in open_bucket or sizes[kind] + size > BUCKET_BYTES:
            open_bucket[kind], sizes[kind] = [], 0
            buckets.append(open_bucket[kind])
        open_bucket[kind].append(tensor)
        sizes[kind] += size
    return buckets


def sum_over_holders(
    shared: Mapping[str, dist.ProcessGroup],
    parameter: Callable[[str], Tensor],
    summed: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Sums the gradients of weights that several pipeline ranks hold, so that all copies get the same update.

    Args:
        shared: The group of the holders of each of these weights.
        parameter: Returns a weight by name.
        summed: The part of each gradient that is already a sum over the holders.
    """
    for name, group in shared.items():
        weight = parameter(name)
        if not weight.requires_grad:
            continue
        users = torch.tensor(float(weight.grad is not None), device=weight.device)
        dist.all_reduce(users, group=group)
        if weight.grad is None:
            if users.item() == 0:  # as in a single process: with a zero gradient an optimizer would decay the weight
                continue
            weight.grad = torch.zeros_like(weight)
        gradient, earlier = to_local(weight.grad), summed.get(name)
        if earlier is not None:
            gradient -= earlier
        dist.all_reduce(gradient, group=group)
        if earlier is not None:
            gradient += earlier


def gradients_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of this rank's parts of the gradients of `parameters`."""
    return {name: to_local(p.grad).clone() for name, p in parameters.items() if p.grad is not None}


def seen_after_backward(trainer: pl.Trainer) -> bool:
    """Returns True if user code may read or change the gradients after the backward pass of every accumulated batch.

    In a single process gradients are complete there.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    module = trainer.lightning_module
    return is_overridden("backward", module) or any(is_overridden("on_after_backward", x) for x in (module, *callbacks))


def refusal_of_gradients(layout: Layout) -> str:
    """Returns the error message for `torch.autograd.grad` in a step under `layout`."""
    return (
        f"`layout='{layout}'`: `training_step` calls `torch.autograd.grad`. Under `pp` no stage has the whole graph; "
        "under `fsdp` the gathered weights that a second pass through the graph needs are freed. Use a layout of `dp` "
        "or `tp`."
    )


def refuse_gradients(layout: Layout) -> Callable[..., Any]:
    """Returns a replacement of `torch.autograd.grad` where a later backward pass cannot use the same graph again.

    The replacement raises a PartitionError for `create_graph` or `retain_graph`.
    """
    original = torch.autograd.grad

    def grad(*args: Any, create_graph: bool = False, retain_graph: bool | None = None, **kwargs: Any) -> Any:
        if create_graph or retain_graph:
            raise PartitionError(refusal_of_gradients(layout))
        return original(*args, **kwargs)

    return grad


class StashedGradients:
    """Gradients computed inside `training_step` by a pipeline schedule, kept until Lightning calls `backward`.

    Lightning's order is training_step, zero_grad, backward; without the stash, zero_grad would erase the gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._old = [p.grad for p in self._parameters]
        self._new: list[Tensor | None] = []
        for parameter in self._parameters:
            parameter.grad = None

    def keep(self) -> None:
        """Stashes the gradients of the schedule and restores the earlier ones."""
        self._new = [p.grad for p in self._parameters]
        for parameter, old in zip(self._parameters, self._old, strict=True):
            parameter.grad = old
        self._old = []

    def add(self, factor: Tensor | None = None) -> None:
        """Adds the stashed gradients to the present ones, in `backward`.

        Args:
            factor: Factor on the stashed gradients, which may then be added again; None: they are added once.
        """
        for parameter, new in zip(self._parameters, self._new, strict=True):
            if new is not None:
                new = new if factor is None else new * factor.to(new.device, torch.float32)
                parameter.grad = new if parameter.grad is None else parameter.grad + new
        if factor is None:
            self._new = [None] * len(self._parameters)


class DeliverGradients(torch.autograd.Function):
    """A loss whose backward pass runs `deliver`, since the pipeline has already computed its gradients."""

    @staticmethod
    def forward(ctx, anchor: Tensor, loss: Tensor, deliver: Callable[[Tensor], None]) -> Tensor:  # type: ignore[override]
        """Returns `loss`, attached to `anchor`, a scalar that requires a gradient."""
        ctx.deliver = deliver
        return loss.clone()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[None, None, None]:
        """Runs `deliver` with the gradient of the loss."""
        ctx.deliver(grad_outputs[0])
        return None, None, None
