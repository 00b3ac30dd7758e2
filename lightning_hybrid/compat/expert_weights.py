"""Shows the weights of experts, of which each rank has a part as a plain tensor, as DTensors of the whole shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_hybrid.collectives import to_local
from lightning_hybrid.parallelize.apply import Partition


class ExpertWeights:
    """The weights of experts of this rank, as hooks of the user see them.

    Args:
        partition: The applied partition.
    """

    def __init__(self, partition: Partition) -> None:
        self._partition, self._parameters = partition, partition.parameters
        local = self._parameters.local() if partition.experts is not None else {}
        self.shapes = {n: partition.shape_of(n) for n in local if partition.expert_plan_of(n) is not None}
        """Shapes of the whole weights, by name."""
        self._shown: dict[str, nn.Parameter] = {}

    @contextmanager
    def shown(self) -> Iterator[dict[int, tuple[str, nn.Parameter]]]:
        """Registers DTensors, which share the memory of this rank's parts.

        Yields:
            Names of the weights and this rank's parts, by the `id` of the DTensor in place of each.
        """
        parts: dict[str, nn.Parameter] = {name: self._parameters[name] for name in self.shapes}  # type: ignore[misc]
        self._shown = {name: self._whole(name, part) for name, part in parts.items()}
        self._parameters.put_all(self._shown)
        try:
            yield {id(self._shown[name]): (name, part) for name, part in parts.items()}
        finally:
            for name, part in parts.items():
                whole = self._shown[name]
                part.requires_grad_(whole.requires_grad)
                if whole.grad is None:
                    part.grad = None
                elif part.grad is None or to_local(whole.grad).data_ptr() != to_local(part.grad).data_ptr():
                    part.grad = self.like_part(name, whole.grad, part)
            # a weight that a hook has replaced stays, and is refused
            self._parameters.put_all(
                {n: part for n, part in parts.items() if self._parameters.visible(n) is self._shown[n]}
            )

    def _whole(self, name: str, part: nn.Parameter) -> nn.Parameter:
        known = self._shown.get(name)  # the same object in every hook: users keep values by parameter
        if known is None or to_local(known.detach()).data_ptr() != to_local(part.detach()).data_ptr():
            known = nn.Parameter(self.spread(name, part.detach()), requires_grad=False)
            for key, value in part.__dict__.items():
                if not key.startswith("_"):
                    setattr(known, key, value)
        known.requires_grad_(part.requires_grad)
        known.grad = None if part.grad is None else self.spread(name, part.grad)
        return known

    def spread(self, name: str, part: Tensor) -> DTensor:
        """Returns a tensor laid out like this rank's part of `name` as a DTensor of the whole shape, in its memory."""
        shape, sharded = self.shapes[name], isinstance(part, DTensor) and self._partition.plan.layout.fsdp > 1
        mesh = self._partition.mesh.device_mesh["fsdp", "ep"] if sharded else self._partition.mesh.device_mesh["ep"]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            to_local(part), mesh, [Shard(0)] * mesh.ndim, run_check=False, shape=shape, stride=stride
        )

    def like_part(self, name: str, tensor: Tensor, part: Tensor | None = None) -> Tensor:
        """Returns a tensor laid out like the DTensor `name` as one laid out like this rank's part."""
        part, local = self._parameters[name] if part is None else part, to_local(tensor)
        if not isinstance(part, DTensor):
            return local
        return DTensor.from_local(
            local, part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
        )
