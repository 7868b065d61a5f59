"""How many micro-batches of an optimizer step share a pass through the backbone.

A pass may hold as many tokens as fit. What a token costs is measured in the passes before; until then, and wherever
memory is scarce, the limit is what the script asked for by its own batch size: its largest micro-batch, padding
included, since stock would have computed that.
"""

from __future__ import annotations

# Of the free memory: the rest is for what grows with tokens only now and then, and for other processes.
SHARE_OF_FREE_MEMORY = 0.5
# Where weights are gathered for each layer, at other times in other processes, and a pass that fails is not made again.
SHARE_WHERE_GATHERED = 0.3
# Backward and recomputation hold a layer's intermediate results beside what forward kept of all layers.
PEAK_OVER_KEPT = 2.0
# Products of this many rows run at full speed; a larger pass would take memory for nothing.
ENOUGH_TOKENS = 8192


def token_limit(worst: int, kept_per_token: float | None, free: int | None, gathers: bool = False) -> int:
    """Tokens that one pass may hold.

    Args:
        worst: tokens of the largest micro-batch so far, padding included.
        kept_per_token: bytes that forward keeps for backward per token; None where nothing was measured.
        free: bytes of device memory that are free; None where unknown.
        gathers: whether weights are gathered in the course of a pass.
    """
    if kept_per_token is None or free is None:
        return worst
    share = SHARE_WHERE_GATHERED if gathers else SHARE_OF_FREE_MEMORY
    fits = int(share * free / (PEAK_OVER_KEPT * max(kept_per_token, 1.0)))
    return max(worst, min(fits, ENOUGH_TOKENS))


def passes(tokens: list[int], limit: int) -> list[int]:
    """Divides micro-batches, in their order, into as few passes as the limit allows, and these as evenly as possible.

    In their order, and not the longest first: losses are computed in the script's order, and a pass that is still open
    holds its memory.

    Args:
        tokens: of each micro-batch.
        limit: tokens per pass; a micro-batch beyond it is a pass of its own.

    Returns:
        Number of micro-batches in each pass.
    """
    if not tokens:
        return []
    low, high = max(tokens), max(limit, *tokens)
    fewest = len(_greedy(tokens, high, limit))
    while low < high:  # the smallest capacity that takes no more passes
        middle = (low + high) // 2
        if len(_greedy(tokens, middle, limit)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return _greedy(tokens, low, limit)


def _greedy(tokens: list[int], capacity: int, limit: int) -> list[int]:
    counts: list[int] = []
    room = 0
    for each in tokens:
        if counts and each <= room:
            counts[-1] += 1
            room -= each
        else:
            counts.append(1)
            room = min(capacity, limit) - each
    return counts
