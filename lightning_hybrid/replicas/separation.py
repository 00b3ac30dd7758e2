"""Gives each gradient memory that it shares with no other.

Autograd does not copy the first gradient of a parameter if nothing else refers to the tensor, but a view of it may be
the gradient of another parameter: of the terms of a sum, of parameters that are reshaped, or expanded to the same shape
(for batches of one sample), or that are DTensors, which hide the tensor. One backward pass is right; a second one, or
clipping, would then write to the shared memory twice.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_hybrid._torch_private import local_part


def separate_gradients(parameters: Iterable[Tensor]) -> None:
    """Copies every gradient of `parameters` whose memory overlaps with that of another one."""
    spans = []
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            begin = gradient.data_ptr()
            spans.append((begin, begin + gradient.numel() * gradient.element_size(), parameter))
    spans.sort(key=lambda span: span[:2])
    end = 0
    for begin, stop, parameter in spans:
        if begin < end and stop > begin and parameter.grad is not None:
            parameter.grad = parameter.grad.clone()
        end = max(end, stop)
