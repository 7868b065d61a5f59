"""Masks of rows without padding that are known to be that.

transformers asks the device whether a mask masks anything, in each forward, and the host waits for the answer. Here it
is known from the batch, and the mask answers itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

_CASTS = (torch.Tensor.to, torch.Tensor.bool)


class DenseMask(torch.Tensor):
    """A mask without zeros. All but a cast, and what asks for zeros, sees and returns plain tensors."""

    _at: int  # its version when there were none

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            is_dense = type(first) is cls and first._version == first._at
            if is_dense and len(args) == 1 and not kwargs:
                if func in (torch.Tensor.all, torch.all):
                    return torch.tensor(True)
                if func in (torch.Tensor.sum, torch.sum) and first.dtype == torch.bool:
                    return torch.tensor(first.numel())
            result = func(*args, **kwargs)
            if type(result) is cls:  # as of operations in place
                return result
            return dense(result) if func in _CASTS and is_dense else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return copy.deepcopy(self.as_subclass(torch.Tensor), memo)


def dense(mask: torch.Tensor) -> torch.Tensor:
    """The same mask, without zeros, in the same memory."""
    result = mask.as_subclass(DenseMask)
    with torch._C.DisableTorchFunctionSubclass():
        result._at = result._version
    return result
