"""Logits that are computed only if somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
}


class LazyLogits(torch.Tensor):
    """Stands for [batch, sequence, vocabulary] logits of a training step whose loss was computed without them.

    Shape, dtype and device are known; `.float()`, which accelerate applies to every output, stays lazy; anything else
    computes the logits, once, with their autograd graph, and acts on those.
    """

    _compute: Callable[[], torch.Tensor]
    _logits: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, compute: Callable[[], torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> LazyLogits:
        logits = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        logits._compute, logits._logits = compute, None
        return logits

    def materialize(self) -> torch.Tensor:
        if self._logits is None:
            self._logits = self._compute()
        return self._logits

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.float and isinstance(args[0], LazyLogits):
            source = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                shape, device = source.shape, source.device
            return LazyLogits(lambda: source.materialize().float(), shape, torch.float32, device)

        def real(value: Any) -> Any:
            return value.materialize() if isinstance(value, LazyLogits) else value

        return func(*tree_map(real, args), **tree_map(real, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only by code that goes under __torch_function__ (C++ callers).
        def real(value: Any) -> Any:
            return value.materialize() if isinstance(value, LazyLogits) else value

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))
