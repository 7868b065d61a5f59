"""How many rows of a gated MLP are computed at a time.

Where a layer is recomputed in backward, a tiled MLP costs no more than another: gate and up are computed twice either
way. So long passes are tiled there by themselves. In little memory all are, as soon as there is more than one tile.
"""

from __future__ import annotations

from .memory import Choice

# Elements of gate, of up and of each other intermediate result of a tile: 256 MiB in 16 bits, and 128 MiB where memory
# is scarce. For a width of 14,336 that is 9,216 rows and 4,608: enough for products at full speed, and for the sums of
# weight gradients, read and written once a tile, to hide behind them.
ELEMENTS, ELEMENTS_IN_LITTLE_MEMORY = 2**27, 2**26
# Fewer rows leave multiprocessors idle; more bring nothing.
LEAST_ROWS, MOST_ROWS = 2048, 16_384
# Tokens of a pass from which on tiles are worth it where memory is not known to be scarce: its MLPs take gigabytes.
LONG = 16_384
_MULTIPLE = 128  # of rows: whole tiles of the products


def rows(tokens: int, width: int, recomputed: bool, choice: Choice) -> int | None:
    """Rows of a tile, all of about the same size; None where the MLP is computed at once.

    Args:
        tokens: of the pass.
        width: columns of gate and of up.
        recomputed: whether the layer is checkpointed, and nothing comes after the MLP that needs its output again.
    """
    scarce = choice == "min_memory"
    if not scarce and (not recomputed or tokens <= LONG):
        return None
    elements = ELEMENTS_IN_LITTLE_MEMORY if scarce else ELEMENTS
    most = min(max(elements // width, LEAST_ROWS), MOST_ROWS)
    if tokens <= most:
        return None
    count = -(-tokens // most)
    return -(-tokens // (count * _MULTIPLE)) * _MULTIPLE
