"""Masks of rows without padding that are known to be that.

transformers asks the device whether a mask masks anything, in each forward, and the host waits for the answer. Here it
is known from the batch, and the mask answers itself.
"""

from __future__ import annotations

from typing import Any

import torch

_CASTS = (torch.Tensor.to, torch.Tensor.bool)


class DenseMask(torch.Tensor):
    """A mask without zeros. All but a cast, and what asks for zeros, sees and returns plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if type(first) is cls and len(args) == 1 and not kwargs:
            if func in (torch.Tensor.all, torch.all):
                return torch.tensor(True)
            if func in (torch.Tensor.sum, torch.sum) and first.dtype == torch.bool:
                return torch.tensor(first.numel())
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result.as_subclass(cls) if func in _CASTS and type(first) is cls else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def dense(mask: torch.Tensor) -> torch.Tensor:
    """The same mask, without zeros, in the same memory."""
    return mask.as_subclass(DenseMask)
