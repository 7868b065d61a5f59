"""Plain linear layers of one input, in one function: y W_1^T + b_1, ..., y W_n^T + b_n.

    dW_i = dout_i^T @ y         db_i = sum over rows of dout_i         dy = sum_i dout_i @ W_i

Two things are gained over n calls of F.linear. dy is summed inside the matrix products, which add to what is there
before they round, where autograd rounds each product and then each sum, in passes of their own. And where y is the
output of a norm, it is not saved: backward makes it again, bit for bit, from what the norm has saved anyway (`Source`),
in one pass of memory.

Where stock's y is float32 under autocast, autograd would add the terms of dy in float32, each rounded to 16 bits: here
they are summed in float32 and rounded once (`wide`).
Shapes: y [..., K], W_i [N_i, K], b_i [N_i] or None, out_i [..., N_i]. Dtypes: those of F.linear, all of one.

Floor, for T rows of 2-byte elements: the products, 2*T*K*N_i operations each in forward, for dy and for dW_i; y made
again costs 4*T*K bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ._launch import device_kind, once_differentiable, without_autocast
from .add_rms_norm import Norm, normed


class Source(NamedTuple):
    """What the input of linear layers was made of: `normed(h, weight, norm, dtype)`. h is detached."""

    h: torch.Tensor
    weight: torch.Tensor | None
    norm: Norm
    dtype: torch.dtype


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total + a @ b in `dtype`, the product not rounded before; in place. `total` None starts a sum."""
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else torch.addmm(total, a, b, out=total)
    if device_kind(a.device) == "cuda":
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    a, b = a.to(dtype), b.to(dtype)
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, source: Source | None, wide: bool, *operands: Any
    ) -> tuple[torch.Tensor, ...]:
        weights, biases = operands[0::2], operands[1::2]
        ctx.set_materialize_grads(False)
        kept: list[torch.Tensor | None] = [None, None]
        if any(ctx.needs_input_grad[3::2]):
            kept = [y, None] if source is None else [source.h, source.weight]
        ctx.save_for_backward(*kept, *weights)
        ctx.source = None if source is None else (source.norm, source.dtype)
        ctx.wide, ctx.shape, ctx.dtype = wide, y.shape, y.dtype
        return tuple(F.linear(y, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        y, norm_weight, *weights = ctx.saved_tensors
        width = ctx.shape[-1]
        needs = ctx.needs_input_grad
        if y is not None and ctx.source is not None:
            norm, dtype = ctx.source
            y = normed(y, norm_weight, norm, dtype).to(ctx.dtype)
        rows = None if y is None else y.reshape(-1, width)
        dtype = torch.float32 if ctx.wide else ctx.dtype
        dy: torch.Tensor | None = None
        results: list[torch.Tensor | None] = []
        for place, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            need_weight, need_bias = needs[3 + 2 * place : 5 + 2 * place]
            if gradient is None:
                results += [None, None]
                continue
            gradient = gradient.reshape(-1, weight.shape[0])
            if needs[0]:
                dy = _add_product(dy, gradient, weight, dtype)
            results.append(torch.mm(gradient.t(), rows) if need_weight and rows is not None else None)
            results.append(gradient.sum(0) if need_bias else None)
        return None if dy is None else dy.view(ctx.shape).to(ctx.dtype), None, None, *results


def linears(
    y: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    source: Source | None = None,
    wide: bool = False,
) -> tuple[torch.Tensor, ...]:
    """F.linear of y with each weight and bias.

    Args:
        y: [..., K].
        weights: [N_i, K] each; biases: [N_i] or None each; frozen or trained, in the dtype of y.
        source: what y was made of; None: y is saved if a weight is trained.
        wide: sum dy in float32.
    """
    for weight, bias in zip(weights, biases, strict=True):
        if weight.ndim != 2 or weight.shape[1] != y.shape[-1]:
            raise ValueError(f"weights must have shape [N, {y.shape[-1]}], got {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
        if weight.dtype != y.dtype or (bias is not None and bias.dtype != y.dtype):
            raise TypeError(f"y is {y.dtype}, a weight {weight.dtype}: cast them to one dtype")
    operands = [each for pair in zip(weights, biases, strict=True) for each in pair]
    return _Linears.apply(y, source, wide, *operands)
