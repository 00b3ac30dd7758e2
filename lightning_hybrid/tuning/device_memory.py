"""Reads memory statistics of a device."""

from __future__ import annotations

import torch


def allocation_retries(device: torch.device) -> int | None:
    """Returns how often the allocator has freed cached memory to make room; None on devices without this count."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def device_name(device: torch.device) -> str:
    """Returns the model and memory of a device, which identify it."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory} bytes"


def share_of_memory(device: torch.device, share: float) -> int:
    """Returns the fraction `share` of the device's memory, in bytes.

    Raises:
        ValueError: On the CPU, whose memory does not belong to one process.
    """
    if device.type != "cuda":
        raise ValueError(
            f"`memory={share}` is a share of an accelerator's memory, and this run is on the {device.type}. Give a "
            "number of bytes."
        )
    return int(share * torch.cuda.get_device_properties(device).total_memory)
