"""4-bit weights of bitsandbytes, expanded for a product with them, and how long the result lives.

A weight is expanded for every use, into memory that the allocator hands from one to the next. Two kinds live longer:
those that are kept for the whole training because the user said so, and the last one that recomputation (under
checkpointing) used of a block, until its gradient uses it again. The weight of `down_proj` is the last of its block in
recompute and the first in backward, so that keeping it takes no memory at the peak.
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
        if not self.keep:
            return _expand(self, state, packed, dtype)
        dense = self._dense
        if dense is None or dense.dtype != dtype or dense.device != packed.device:
            dense = self._dense = _expand(self, state, packed, dtype)
        return dense

    def last_of_its_block(self, state: Any, packed: torch.Tensor, dtype: torch.dtype, backward: bool) -> torch.Tensor:
        """The same; from recomputation to the gradient that follows, it is expanded once."""
        global _last
        last, _last = _last, None
        if backward and last is not None and last[0] is self and last[1].dtype == dtype:
            return last[1]
        dense = self(state, packed, dtype, backward)
        if not backward and torch._C._current_graph_task_id() != -1:  # in a backward pass: this is recomputation
            _last = (self, dense)
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
    if packed.is_cuda or _launch.INTERPRET:
        return expander.packed(state, packed).expand(dtype)
    dense: torch.Tensor = sys.modules["bitsandbytes"].functional.dequantize_4bit(packed.view(-1, 1), state)
    return dense.to(dtype)


_EXPANDERS = WeakIdKeyDictionary()  # by QuantState, which cannot be hashed
_last: tuple[Expander, torch.Tensor] | None = None


def expander_of(state: Any) -> Expander:
    """The one of this QuantState."""
    expander: Expander | None = _EXPANDERS.get(state)
    if expander is None:
        expander = _EXPANDERS[state] = Expander()
    return expander


def forget_last() -> None:
    """Where recomputation was not followed by a gradient: an error between them."""
    global _last
    _last = None


def let_go() -> None:
    """Holds no tensors any more, so that a model which is moved now leaves nothing behind."""
    forget_last()
    for expander in list(_EXPANDERS.values()):
        expander.let_go()
