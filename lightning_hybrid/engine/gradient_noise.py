"""Measures squared norms of the gradients of a batch's parts, during the backward pass of each part.

A part is an accumulated batch of one replica, or a microbatch of a pipeline. Autograd passes the gradient of every part
to the hooks of a weight, under `fsdp` to those of the gathered weight; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_hybrid._torch_private import unscales_itself
from lightning_hybrid.adapt.gradient_noise import PartNorms
from lightning_hybrid.engine.norms import local_norms, local_square
from lightning_hybrid.parallelize.apply import Partition


class GradientNoise:
    """Measures a step's `PartNorms`: one for the weights outside divided experts, and one for divided experts.

    The gradient of an expert that `ep` divides is a sum over the tokens of all replicas of its group, so its parts are
    larger. Weights that several pipeline ranks hold are left out: no rank has a part's whole gradient of them.

    Args:
        partition: The applied partition.
        device: This rank's device.
        scaler: The loss scaler of half precision.
    """

    numbers = 5
    """Length of the vector that is summed over ranks."""

    def __init__(self, partition: Partition, device: torch.device, scaler: Any = None) -> None:
        self._partition, self._device, self._scaler = partition, device, scaler
        self._norms: tuple[list[Tensor], list[Tensor]] = [], []
        self._handles: dict[int, RemovableHandle] = {}
        self._sizes: list[tuple[int, int]] = []
        self._even = True
        self.measures = True
        """True if the current step is measured."""
        self.accumulate = 1
        """Number of batches of a complete step."""
        self.last: list[PartNorms] = []
        """`PartNorms` of the last step; empty if parts had different sizes or were missing."""
        self.batch_size = 0
        """Number of samples of all replicas in the last step; 0 if parts had different sizes or were missing."""

    # ---- in the backward pass

    def install(self) -> None:
        """Registers hooks of the trainable weights that this rank counts, unless they have one."""
        partition = self._partition
        divided = {} if partition.plan.tensor_plan is None else partition.plan.tensor_plan.parameters
        for name, parameter in partition.parameters.local().items():
            copied = name not in divided and partition.mesh.rank("tp") > 0
            if copied or name in partition.tied_weight_groups or not parameter.requires_grad:
                continue
            if id(parameter) not in self._handles:
                kind = self._norms[partition.expert_plan_of(name) is not None]
                self._handles[id(parameter)] = parameter.register_hook(self._norm_hook(kind))

    def remove(self) -> None:
        """Removes the hooks, and discards the measurements of the current step."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.forget()

    def _norm_hook(self, norms: list[Tensor]) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            if self.measures:
                norms.extend(local_norms([gradient]))

        return note

    def count_batch(self, samples: int, parts: int, even: bool) -> None:
        """Counts a batch of this replica, run in `parts` parts; `even` is True if all replicas have equal sizes."""
        self._sizes.append((samples, parts))
        self._even = self._even and even

    # ---- before the optimizer's step

    def local_numbers(self, optimizer: Any, norms: Mapping[int, Tensor]) -> Tensor:
        """Returns this rank's contribution to the squared norms, of shape `(numbers,)`, to be summed over all ranks.

        The vector holds the sum over parts and the norm of the whole gradient, first outside experts, then of experts;
        and 1 if this rank's parts have equal sizes.

        Args:
            optimizer: The optimizer.
            norms: Norms of its gradients, by the `id` of the parameter.
        """
        found = torch.zeros(self.numbers, dtype=torch.float64, device=self._device)
        for i, parts in enumerate(self._norms):
            if parts:
                found[2 * i] = torch.stack(parts).double().square().sum()
            whole = local_square(self._partition, norms, self._device, partial(self._belongs, experts=bool(i)))
            found[2 * i + 1] = whole / self._partition.plan.layout.dp
        if self._scaler is not None:  # the parts' gradients are of the scaled loss
            scale = self._scaler.get_scale() ** 2
            found[0::2] /= scale
            if unscales_itself(optimizer):
                found[1::2] /= scale
        found[4] = float(self._even and len(self._sizes) == self.accumulate and len(set(self._sizes)) == 1)
        return found

    def _belongs(self, name: str, experts: bool) -> bool:
        partition = self._partition
        return name not in partition.tied_weight_groups and (partition.expert_plan_of(name) is not None) == experts

    def set_sums(self, numbers: list[float], ranks: int) -> None:
        """Computes `last` and `batch_size` from the sums of `local_numbers` over all ranks."""
        layout = self._partition.plan.layout
        alike = round(numbers[4]) == ranks
        parts = self.accumulate * self._sizes[0][1] if alike else 0
        self.last = []
        self.batch_size = layout.replicas * self.accumulate * self._sizes[0][0] if alike else 0
        for i, group in enumerate((1, layout.ep)):
            # a part's gradient is scaled by 1 / `parts`; those of experts are sums over a group's replicas
            count = layout.replicas * parts // group
            if alike and numbers[2 * i + 1] > 0:
                square = numbers[2 * i] * (parts / group) ** 2 / count
                self.last.append(PartNorms(parts=count, mean_of_squares=square, square_of_mean=numbers[2 * i + 1]))
        self.forget()

    def forget(self) -> None:
        """Discards the measurements of the current step."""
        for norms in self._norms:
            norms.clear()
        self._sizes, self._even = [], True
