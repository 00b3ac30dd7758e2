"""Highest rates of devices, for model FLOPs utilization."""

from __future__ import annotations

import logging
import warnings

import torch
from lightning.fabric.utilities.throughput import get_available_flops

_DENSE_TFLOPS: dict[str, dict[torch.dtype, float]] = {
    # NVIDIA's data sheets state these with sparsity, of which half is left without; Lightning 2.6 has the larger value.
    "h200 nvl": {torch.bfloat16: 835.5, torch.float16: 835.5},
    "h100 nvl": {torch.bfloat16: 835.5, torch.float16: 835.5},
    # Devices that Lightning 2.6 does not know by the name that torch gives them.
    "h200": {torch.bfloat16: 989.5, torch.float16: 989.5},
    "gh200": {torch.bfloat16: 989.5, torch.float16: 989.5},
    "b200": {torch.bfloat16: 2250.0, torch.float16: 2250.0},
    "gb200": {torch.bfloat16: 2500.0, torch.float16: 2500.0},
    "l40s": {torch.bfloat16: 362.0, torch.float16: 362.0},
}
"""Dense tensor-core rates by a part of the device's name; sources: the data sheets of these products."""
_TF32_SHARE = 0.5
"""Rate of TF32 relative to bfloat16 on all devices of the table."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the highest number of dense operations per second of a device in `dtype`; None if it is not known.

    In float32, the rate is that of TF32 if `torch.set_float32_matmul_precision` allows it.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    key = max((k for k in _DENSE_TFLOPS if k in name), key=len, default=None)
    if key is None:
        return _known_to_lightning(device, dtype)
    if dtype in _DENSE_TFLOPS[key]:
        return _DENSE_TFLOPS[key][dtype] * 1e12
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _DENSE_TFLOPS[key][torch.bfloat16] * _TF32_SHARE * 1e12
    return None


def _known_to_lightning(device: torch.device, dtype: torch.dtype) -> float | None:
    logger = logging.getLogger("lightning.fabric.utilities.throughput")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the device is unknown, which the caller says
            found = get_available_flops(device, dtype)
    finally:
        logger.setLevel(level)
    return None if found is None else float(found)
