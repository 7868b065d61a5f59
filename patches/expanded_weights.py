"""4-bit weights of bitsandbytes, expanded for a product with them, and how long the result lives.

A weight is expanded for every use, into memory that the allocator hands from one to the next. Two kinds live longer:
those that are kept for the whole training because the user said so, and those that recomputation (under checkpointing)
has used, until the gradient of the same layer uses them again. The latter wait while the layer's gradients take the
most memory, so they may not be many bytes; but the last weight of a block is the first in backward, and costs nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from hf_turbo.kernels import _launch
from hf_turbo.kernels.dequantize import Nested, Packed4bit
from torch.utils.weak import WeakIdKeyDictionary


class Expander:
    """Expands the weight of one 4-bit layer, whose QuantState is an argument of every call: this object lives as long.

    Attributes:
        keep: whether what was expanded is kept for as long as this is set.
    """

    def __init__(self) -> None:
        self._packed: Packed4bit | None = None
        self._address, self._absmax = 0, None
        self._dense: torch.Tensor | None = None
        self.keep = False

    def __call__(self, state: Any, packed: torch.Tensor, dtype: torch.dtype, backward: bool) -> torch.Tensor:
        """The weight [N, K] in `dtype`, the same bits as bitsandbytes gives."""
        return self._reuse_or_expand(state, packed, dtype, backward, MOST_WAITING_BYTES)

    def last_of_its_block(self, state: Any, packed: torch.Tensor, dtype: torch.dtype, backward: bool) -> torch.Tensor:
        """The same, for a weight whose use in recomputation is followed by that of its gradient."""
        return self._reuse_or_expand(state, packed, dtype, backward, sys.maxsize)

    def _reuse_or_expand(
        self, state: Any, packed: torch.Tensor, dtype: torch.dtype, backward: bool, most_waiting: int
    ) -> torch.Tensor:
        dense = self._dense if self.keep else _WAITING.pop(self, None) if backward else None
        if dense is not None and dense.dtype == dtype and dense.device == packed.device:
            return dense
        dense = _expand(self, state, packed, dtype)
        if self.keep:
            self._dense = dense
        elif not backward:
            if torch._C._current_graph_task_id() == -1:
                # No backward pass, so this is no recomputation. What still waits had no gradient to wait for.
                forget_waiting()
            # A list: each device has a thread of its own for backward.
            elif dense.nbytes + sum(each.nbytes for each in list(_WAITING.values())) <= most_waiting:
                _WAITING[self] = dense
        return dense

    def packed(self, state: Any, packed: torch.Tensor) -> Packed4bit:
        """The packed weight, checked once."""
        # A state that moves to another device gets other tensors.
        if self._packed is None or self._address != packed.data_ptr() or self._absmax is not state.absmax:
            nested = None
            if state.nested:
                nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
            self._packed = Packed4bit(packed, state.absmax, state.code, state.blocksize, state.shape, nested)
            self._address, self._absmax = packed.data_ptr(), state.absmax
        return self._packed

    def let_go(self) -> None:
        """Holds no tensors any more, until the next use."""
        self._packed = self._absmax = self._dense = None


def _expand(expander: Expander, state: Any, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if _launch.device_kind(packed.device) == "cuda" or _launch.INTERPRET:
        return expander.packed(state, packed).expand(dtype)
    dense: torch.Tensor = sys.modules["bitsandbytes"].functional.dequantize_4bit(packed.view(-1, 1), state)
    return dense.to(dtype)


_EXPANDERS = WeakIdKeyDictionary()  # by QuantState, which cannot be hashed
# Expanded by recomputation, for the gradients that follow.
_WAITING: dict[Expander, torch.Tensor] = {}
# The four projections of the attention of an 8B model take 80 MiB, one of its MLP 112.
MOST_WAITING_BYTES = 2**27


def expander_of(state: Any) -> Expander:
    """The one of this QuantState."""
    expander: Expander | None = _EXPANDERS.get(state)
    if expander is None:
        expander = _EXPANDERS[state] = Expander()
    return expander


def forget_waiting() -> None:
    """Where recomputation was not followed by a gradient: an error between them."""
    _WAITING.clear()


def give_up() -> bool:
    """After memory ran out: none is kept any more. False where none was."""
    kept = [expander for expander in list(_EXPANDERS.values()) if expander.keep]
    for expander in kept:
        expander.keep = False
        expander.let_go()
    return bool(kept)


def let_go() -> None:
    """Holds no tensors any more, so that a model which is moved now leaves nothing behind."""
    forget_waiting()
    for expander in list(_EXPANDERS.values()):
        expander.let_go()
