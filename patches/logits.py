"""Logits that are computed only if somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "grad_fn", "is_leaf", "layout")
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
}
# What wrappers apply to every output of a model: accelerate casts to fp32, DDP clones.
_LAZY = {torch.Tensor.float: torch.float32, torch.Tensor.clone: None}


class LazyLogits(torch.Tensor):
    """Stands for [batch, sequence, vocabulary] logits of a training step whose loss was computed without them.

    Shape, dtype and device are known; `.float()` and `.clone()` stay lazy; anything else computes the logits, once,
    with their autograd graph and under the autocast of the forward, and acts on those.

    Raises:
        RuntimeError: the head's parameters have changed since, so that the logits of the step cannot be had any more.
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
        if func in _LAZY and isinstance(args[0], LazyLogits):
            source = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                shape, device, dtype = source.shape, source.device, _LAZY[func] or source.dtype
            return LazyLogits(lambda: source.materialize().to(dtype), shape, dtype, device)
        return func(*tree_map(_real, args), **tree_map(_real, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only by code that goes under __torch_function__ (C++ callers).
        return func(*tree_map(_real, args), **tree_map(_real, kwargs or {}))


def _real(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyLogits) else value


@torch.compiler.disable  # reads version counters; it follows the loss, which breaks the graph already
def in_forward_context(
    compute: Callable[[], torch.Tensor], parameters: list[torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """`compute` as it would have run now: with gradients, under the present autocast, with the present parameters."""
    device_type = parameters[0].device.type
    autocast, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    versions = [parameter._version for parameter in parameters]

    def later() -> torch.Tensor:
        if versions != [parameter._version for parameter in parameters]:
            raise RuntimeError(
                "outputs.logits was read after the language-model head had changed. Read it before optimizer.step(), "
                "or keep the stock loss: hf_turbo.enable(loss=False)"
            )
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, dtype, autocast):
            return compute()

    return later
