"""The 16-bit copy of a weight that products are computed with, where the weight itself is wider (autocast).

Kernels make such a copy where they need one. Whoever knows how long weights stay as they are may keep copies and hand
them out: `offer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Given a weight and a dtype: a copy of the weight as it is now, or None.
Lookup = Callable[[torch.Tensor, torch.dtype], torch.Tensor | None]
_lookup: Lookup | None = None


def offer(lookup: Lookup | None) -> Lookup | None:
    """Asks `lookup` for copies from now on, or nobody; returns who was asked before."""
    global _lookup
    before, _lookup = _lookup, lookup
    return before


def is_offered() -> bool:
    """Whether somebody knows."""
    return _lookup is not None


def _kept(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    return None if _lookup is None or torch.compiler.is_compiling() else _lookup(weight, dtype)


def compute_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight in `dtype`, for products that autograd does not see; not to be written to."""
    if weight.dtype == dtype:
        return weight
    kept = _kept(weight, dtype)
    return weight.to(dtype) if kept is None else kept


def cast_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight.to(dtype)`, of which autograd casts the gradient back."""
    if weight.dtype == dtype:
        return weight
    kept = _kept(weight, dtype)
    return weight.to(dtype) if kept is None else _Kept.apply(weight, kept)


class _Kept(torch.autograd.Function):
    """A weight, its copy in."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.dtype = weight.dtype
        return kept

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.dtype), None
