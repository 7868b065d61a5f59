"""A linear layer whose weight is wider than its products: what autocast makes of F.linear, with fewer casts.

    y = cast(x) @ cast(weight)^T + cast(bias)               [..., N]
    dx = dy @ cast(weight)      dweight = dy^T @ cast(x)      dbias = sum over rows of dy

Shapes: x [..., K]; weight [N, K]; bias [N] or None. Dtypes: x in the dtype of the products (bfloat16, float16) or
wider; weight and bias wider; y in that of the products. Gradients have the dtypes of what they belong to.

Forward has the same bits as autocast. Autocast makes a cast of x for every layer that reads it, and a cast of the
weight for every forward and every recomputation; here both are given, and the caller may share them. Backward of
autocast rounds dx and dweight to 16 bits and widens them; on CUDA bfloat16 products leave the sum in float32 as it is,
which is one rounding and one pass less. float16 gradients are rounded as by autocast: a gradient scaler waits for their
overflow.

Floor beyond the products: nothing; in autocast 6*T*K bytes for x, 6*N*K for the weight, and as much in backward.

Source: gradients by the chain rule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ._launch import device_kind, once_differentiable, without_autocast


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `dtype`, which may be wider than theirs."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    if a.dtype == torch.bfloat16 and dtype == torch.float32 and device_kind(a.device) == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


class _AutocastLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        low_x: torch.Tensor,
        low_weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        need_x, need_weight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(low_x if need_weight else None, low_weight if need_x else None)
        return F.linear(low_x, low_weight, None if bias is None else bias.to(low_weight.dtype))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low_x, low_weight = ctx.saved_tensors
        shape, dy = dy.shape[:-1], dy.reshape(-1, dy.shape[-1])
        dx = dweight = dbias = None
        if low_weight is not None:
            dx = _product(dy, low_weight, ctx.dtypes[0]).view(*shape, low_weight.shape[1])
        if low_x is not None:
            dweight = _product(dy.t(), low_x.reshape(-1, low_x.shape[-1]), ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            wide = ctx.dtypes[2] if dy.dtype == torch.bfloat16 else dy.dtype
            dbias = dy.sum(0, dtype=wide).to(ctx.dtypes[2])
        return dx, dweight, dbias, None, None


def autocast_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low_x: torch.Tensor,
    low_weight: torch.Tensor,
) -> torch.Tensor:
    """F.linear(x, weight, bias) as under autocast.

    Args:
        x: [..., K], weight: [N, K], bias: [N] or None: whose gradients are computed.
        low_x, low_weight: x and weight in the dtype of the products, without gradients of their own.
    """
    return _AutocastLinear.apply(x, weight, bias, low_x, low_weight)
