"""What a model's checkpointed layers keep, given what memory is free.

A layer is recomputed, or kept whole, or recomputed without its attention, whose outputs are kept. The layers kept whole
are the last ones: backward frees theirs first, before the others are recomputed, so that the peak is either at the end
of forward or is that of stock. Which way is worth more is a matter of the time that a byte saves: attention's outputs
are few, and its time grows with the length of documents, so that long contexts begin with them, and short ones with
whole layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

Choice = Literal["auto", "as_is", "max_speed", "min_memory"]

# Of the memory that is free when a pass begins. The rest is for what the pass takes besides (logits, gradients, the
# layer being recomputed: see batching.py, which takes half), and for other processes.
SHARE_OF_FREE_MEMORY: dict[str, float] = {"auto": 0.4, "max_speed": 0.8}

# Of the memory that is free when a training begins, 4-bit weights that stay expanded may take so much: an eighth, since
# nothing has been measured yet, and most of the rest is for layers that need no recomputation.
SHARE_FOR_EXPANDED_WEIGHTS: dict[str, float] = {"auto": 0.125, "max_speed": 0.25}
# Of the memory that is free when a step begins: of copies of weights, which save less time per byte than layers kept.
SHARE_FOR_COPIES = 0.2

# Of what the rest of a pass was measured to take, so much stays free beside the layers kept.
MARGIN = 1.2
_LEAST = 2**20

# A FLOP of attention takes as long as so many of linear layers: of Llama-8B at 32,768 tokens on an H200, 15.3 of the
# 34.5 ms of a layer's forward are attention's, by cuDNN; where FlashAttention computes documents, 25.4 ms.
COST_OF_SCORES = 1.5
# What was kept before is kept again unless something else saves more time than this share: free memory varies a little
# from pass to pass, and other sizes would leave pieces behind in the allocator.
WORTHWHILE = 0.02

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


def keeps_expanded(expanded: int, free: int | None, choice: Choice = "auto") -> bool:
    """Whether 4-bit weights stay expanded.

    Args:
        expanded: bytes of all of them. free: bytes of device memory when the training begins; None where unknown.
    """
    return free is not None and 0 < expanded <= SHARE_FOR_EXPANDED_WEIGHTS.get(choice, 0.0) * free


def copies_fit(size: int, free: float, rest: float) -> bool:
    """Whether memory for copies of weights is plainly free.

    Args:
        size: bytes of all copies.
        free: bytes of device memory when a step begins.
        rest: bytes that the step takes besides, at most.
    """
    return size <= min(SHARE_FOR_COPIES * free, free - MARGIN * rest)


class Layer(NamedTuple):
    """A layer in a pass.

    Attributes:
        whole: bytes that it keeps if nothing is recomputed. attention: those of attention's outputs; None where these
            cannot be kept.
        time: of its forward, in any unit. attention_time: of attention in it.
    """

    whole: float
    attention: float | None
    time: float
    attention_time: float


def layer(whole: float, attention: float | None, products: float, scores: float) -> Layer:
    """A layer by the FLOP of its forward, of linear layers and of attention."""
    return Layer(whole, attention, products + COST_OF_SCORES * scores, COST_OF_SCORES * scores)


Kept = tuple[int, tuple[int, ...]]


def what_to_keep(layers: Sequence[Layer], room: float, before: Kept = (0, ())) -> Kept:
    """How many of the last layers are kept whole, and the numbers of those that keep attention's outputs.

    It is what saves most time: for each number of whole layers, the other ones keep attention's outputs where these
    save most per byte, the last of equal ones first.

    Args:
        layers: in the order of forward.
        room: bytes for all of them.
        before: what the last pass kept.
    """
    worth = [
        (each.attention_time / each.attention, index, each.attention)
        for index, each in enumerate(layers)
        if each.attention and each.attention_time > 0
    ]
    worth.sort(reverse=True)
    best: Kept = 0, ()
    most = 0.0
    saved, left = 0.0, room
    for whole in range(layers_to_keep([each.whole for each in layers], room) + 1):
        if whole:
            left -= layers[-whole].whole
            saved += layers[-whole].time
        attention, gain, rest = [], saved, left
        for _, index, size in worth:
            if index < len(layers) - whole and size <= rest:
                attention.append(index)
                gain += layers[index].attention_time
                rest -= size
        if gain >= most:
            best, most = (whole, tuple(sorted(attention))), gain
    return before if _fits(layers, room, before) and _saved(layers, before) >= (1 - WORTHWHILE) * most else best


def _fits(layers: Sequence[Layer], room: float, kept: Kept) -> bool:
    whole, attention = kept
    if whole > len(layers) or any(index >= len(layers) - whole for index in attention):
        return False
    sizes = [layers[index].attention for index in attention]
    known = [size for size in sizes if size]
    return len(known) == len(sizes) and sum(each.whole for each in layers[len(layers) - whole :]) + sum(known) <= room


def _saved(layers: Sequence[Layer], kept: Kept) -> float:
    whole, attention = kept
    of_whole = sum(each.time for each in layers[len(layers) - whole :])
    return of_whole + sum(layers[index].attention_time for index in attention)


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
