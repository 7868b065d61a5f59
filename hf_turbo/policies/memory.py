"""How many of a model's checkpointed layers need no recomputation, given what memory is free.

The layers kept are the last ones: backward frees theirs first, before the others are recomputed, so that the peak is
either at the end of forward or is that of stock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Choice = Literal["auto", "as_is", "max_speed", "min_memory"]

# Of the memory that is free when a pass begins. The rest is for what the pass takes besides (logits, gradients, the
# layer being recomputed: see batching.py, which takes half), and for other processes.
SHARE_OF_FREE_MEMORY: dict[str, float] = {"auto": 0.4, "max_speed": 0.8}

# Of what the rest of a pass was measured to take, so much stays free beside the layers kept.
MARGIN = 1.2
_LEAST = 2**20

_UNITS = {"": 1, "B": 1} | {
    f"{k}{b}": base**i for i, k in enumerate("KMGT", 1) for b, base in (("B", 1000), ("iB", 1024))
}


def budget_bytes(budget: str | float, total: int) -> int:
    """A memory budget in bytes.

    Args:
        budget: "8GiB", "800 MB", or a share of the device's memory: a number up to 1, as text too.
        total: bytes of the device's memory.

    Raises:
        ValueError: none of these.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(budget))
    if not isinstance(budget, bool) and match is not None and match[2] in _UNITS:
        number = float(match[1])
        if 0 < number <= 1 and not match[2]:
            return int(number * total)
        if number * _UNITS[match[2]] >= _LEAST:
            return int(number * _UNITS[match[2]])
    raise ValueError(
        f"hf_turbo option memory_budget={budget!r}: a size such as '8GiB', or a share of the device's memory, up to 1"
    )


def room(free: float, rest: float, choice: Choice = "auto") -> float:
    """Bytes that layers may keep instead of being recomputed.

    Args:
        free: bytes of device memory when the pass begins.
        rest: bytes that the pass takes besides, at most.
    """
    return min(SHARE_OF_FREE_MEMORY.get(choice, 0.0) * free, free - MARGIN * rest)


def layers_to_keep(sizes: Sequence[float], room: float) -> int:
    """How many of the last layers fit.

    Args:
        sizes: bytes that each layer keeps for backward, in the order of forward.
        room: bytes for all of them.
    """
    count = 0
    for size in reversed(sizes):
        room -= size
        if room < 0:
            break
        count += 1
    return count
