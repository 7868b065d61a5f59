"""What a device's memory holds, without the sorting that makes torch's own functions take a millisecond."""

from __future__ import annotations

import weakref

import torch

_HELD: weakref.WeakSet[Held] = weakref.WeakSet()


class Held:
    """Memory of a device that torch counts as unused, while nobody else may have it: that of recordings.

    Attributes:
        bytes: for as long as this object lives.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0
        _HELD.add(self)


def allocated(device: torch.device) -> int | None:
    """Bytes in tensors; None where the device does not say."""
    return _statistic(device, "allocated_bytes")


def free(device: torch.device) -> int | None:
    """Bytes that the driver can still give, and those that torch holds unused; None if unknown."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    held = sum(each.bytes for each in _HELD if each.device == device)
    return min(free + reserved(device), int(share * total)) - allocated(device) - held  # type: ignore[operator]


def reserved(device: torch.device) -> int | None:
    """Bytes that torch has from the driver, used or not; None where the device does not say."""
    return _statistic(device, "reserved_bytes")


def peak_allocated(device: torch.device) -> int | None:
    """The most bytes that were in tensors at one time; None where the device does not say."""
    return _statistic(device, "allocated_bytes", "peak")


def _statistic(device: torch.device, name: str, which: str = "current") -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.memory_stats_as_nested_dict(device)[name]["all"][which])
