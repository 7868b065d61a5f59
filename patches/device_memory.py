"""What a device's memory holds, without the sorting that makes torch's own functions take a millisecond."""

from __future__ import annotations

import torch


def allocated(device: torch.device) -> int | None:
    """Bytes in tensors; None where the device does not say."""
    return _statistic(device, "allocated_bytes")


def free(device: torch.device) -> int | None:
    """Bytes that the driver can still give, and those that torch holds unused; None if unknown."""
    if device.type != "cuda":
        return None
    reserved, allocated = _statistic(device, "reserved_bytes"), _statistic(device, "allocated_bytes")
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free + reserved - allocated, int(share * total) - allocated)  # type: ignore[operator]


def peak_allocated(device: torch.device) -> int | None:
    """The most bytes that were in tensors at one time; None where the device does not say."""
    return _statistic(device, "allocated_bytes", "peak")


def _statistic(device: torch.device, name: str, which: str = "current") -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.memory_stats_as_nested_dict(device)[name]["all"][which])
