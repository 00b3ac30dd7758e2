"""Reads memory statistics of a device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

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


def peak_bytes(device: torch.device) -> int:
    """Returns the peak memory of this process: allocated on its accelerator, otherwise resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_bytes(device: torch.device, ranks: int) -> int | None:
    """Returns the free memory of a rank: of its accelerator, or its share of the host's memory; None if it is unknown.

    Args:
        device: This rank's device.
        ranks: Number of ranks on this machine, which share the memory of the host.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kibibytes is None else 1024 * kibibytes // ranks
