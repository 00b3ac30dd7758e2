"""What a device's memory says of itself."""

from __future__ import annotations

import torch


def allocation_retries(device: torch.device) -> int | None:
    """How often the allocator has had to give cached memory back to make room; None on devices that do not count."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def device_name(device: torch.device) -> str:
    """The device's model and memory, to know it again."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory} bytes"


def share_of_memory(device: torch.device, share: float) -> int:
    """So much of the device's memory, in bytes.

    Raises:
        ValueError: On the CPU, whose memory is not a process's own.
    """
    if device.type != "cuda":
        raise ValueError(
            f"`memory={share}` is a share of an accelerator's memory, and this run is on the {device.type}. Give a "
            "number of bytes."
        )
    return int(share * torch.cuda.get_device_properties(device).total_memory)
