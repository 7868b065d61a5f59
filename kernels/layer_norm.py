"""LayerNorm over the last dimension, forward and backward.

Formula, with statistics in float32 whatever the dtype of x:

    rstd = 1 / sqrt(mean((x - mean(x))^2) + eps)    h = (x - mean(x)) * rstd
    y    = (h * weight + bias).to(x.dtype)

    g  = dy * weight
    dx = rstd * (g - mean(g) - h * mean(g * h))
    dweight = sum over rows of dy * h               dbias = sum over rows of dy

Shapes: x [..., H]; weight [H], [heads, H] for x [..., heads, H] (Cohere's query and key norms), or None; bias [H] or
None; y like x. x may be any view whose rows are contiguous and lie two strides apart; any other view is copied first,
and so is every non-contiguous x under a two-dimensional weight.
Dtypes: float16, bfloat16, float32 in any mix; float64 takes the torch reference. y has the dtype of x. dweight and
dbias are summed in float32 per program and added up in a fixed order: no atomics.

Floor, for T rows of e-byte elements: forward 2*T*H*e + 8*T bytes, backward 3*T*H*e + 8*T. Each trained parameter adds
8*P*H for the P partial sums; a frozen one adds nothing.

Raises TypeError for dtypes that are not floating point, ValueError for shapes or devices that do not fit and for H >
65536 where Triton runs.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016); gradient by the chain rule; order of roundings as in
CohereLayerNorm of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import cdiv, in_rows, launch, once_differentiable, register_op, rows_of, use_triton, with_rows
from .rms_norm import MAX_WIDTH, persistent_grid, sum_partials, tile_of

# ---------------------------------------------------------------------------------------------------- torch reference


def _reference_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fills `y`, `mean` and `rstd`; computes in the dtype of `rstd`."""
    wide = x.to(rstd.dtype)
    torch.mean(wide, -1, out=mean)
    centred = wide - mean.unsqueeze(-1)
    torch.rsqrt(centred.square().mean(-1).add_(eps), out=rstd)
    result = centred.mul_(rstd.unsqueeze(-1))
    if weight is not None:
        result = result.mul_(weight.to(rstd.dtype))
    if bias is not None:
        result = result.add_(bias.to(rstd.dtype))
    y.copy_(result)


def _reference_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Fills those of `dx`, `dweight` and `dbias` that are wanted."""
    gradient = dy.to(rstd.dtype)
    normed = (x.to(rstd.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    if dweight is not None:
        dweight.copy_((gradient * normed).reshape(-1, *dweight.shape).sum(0))
    if dbias is not None:
        dbias.copy_(gradient.reshape(-1, *dbias.shape).sum(0))
    if dx is not None:
        if weight is not None:
            gradient = gradient * weight.to(rstd.dtype)
        projection = (gradient * normed).mean(-1, keepdim=True)
        gradient = gradient - gradient.mean(-1, keepdim=True)
        torch.mul(gradient - normed * projection, rstd.unsqueeze(-1), out=dx)


# ------------------------------------------------------------------------------------------------------------- Triton

# A weight [heads, H] is walked one head at a time: program (i, head) sees rows head, head + HEADS, head + 2 * HEADS ...
# A weight [H] is one head.


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    inner,
    x_outer,
    x_inner,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] of whole rows per program. y, mean and rstd are dense in the row order of x."""
    head = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64) * HEADS + head
    column = tl.arange(0, COLUMNS)
    in_row = column < WIDTH
    valid = row < rows
    mask = valid[:, None] & in_row[None, :]
    x_row = row // inner * x_outer + row % inner * x_inner
    x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) * (1.0 / WIDTH)
    centred = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) * (1.0 / WIDTH)
    # The approximate rsqrt is off by up to 2 ulp, which the whole row would share.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(mean_ptr + row, mean, mask=valid)
    tl.store(rstd_ptr + row, rstd, mask=valid)
    y = centred * rstd[:, None]
    # Every program reads weight and bias: keep them in L1.
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + head * WIDTH + column, mask=in_row, other=0.0, eviction_policy="evict_last")
        y = y * weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=in_row, other=0.0, eviction_policy="evict_last")
        y = y + bias.to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * WIDTH + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    inner,
    x_outer,
    x_inner,
    dy_outer,
    dy_inner,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program walks every num_programs-th tile; its part of dweight and dbias is [program, head] of theirs."""
    head = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    in_row = column < WIDTH
    if weight_ptr is not None and dx_ptr is not None:
        weight = tl.load(weight_ptr + head * WIDTH + column, mask=in_row, other=0.0, eviction_policy="evict_last")
        weight = weight.to(tl.float32)[None, :]
    if dweight_ptr is not None:
        dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS * HEADS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64) * HEADS + head
        valid = row < rows
        mask = valid[:, None] & in_row[None, :]
        x_row = row // inner * x_outer + row % inner * x_inner
        dy_row = row // inner * dy_outer + row % inner * dy_inner
        x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=valid, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]
        # Padding columns of normed are not zero, but only ever meet those of dy, which are.
        normed = (x - mean) * rstd
        if dweight_ptr is not None:
            dweight += dy * normed
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            gradient = dy
            if weight_ptr is not None:
                gradient = dy * weight
            projection = tl.sum(gradient * normed, axis=1) * (1.0 / WIDTH)
            shift = tl.sum(gradient, axis=1) * (1.0 / WIDTH)
            dx = (gradient - shift[:, None] - normed * projection[:, None]) * rstd
            tl.store(dx_ptr + row[:, None] * WIDTH + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = (tl.program_id(0).to(tl.int64) * HEADS + head) * WIDTH + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=in_row)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=in_row)


# ---------------------------------------------------------------------------------------------------------------- ops


def _on_triton(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    return use_triton(x) and all(parameter is None or use_triton(parameter) for parameter in parameters)


def _heads(weight: torch.Tensor | None) -> int:
    return weight.shape[0] if weight is not None and weight.ndim == 2 else 1


def _empty_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = torch.empty_like(x.select(-1, 0), dtype=wide)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = _empty_forward(x, weight, bias, eps)
    if x.numel() == 0:
        return y, mean, rstd
    if not _on_triton(x, weight, bias):
        _reference_forward(x, weight, bias, eps, y, mean, rstd)
        return y, mean, rstd
    width, layout, count, heads = x.shape[-1], rows_of(x), rstd.numel(), _heads(weight)
    columns, rows, warps = tile_of(width)
    launch(
        _forward_kernel,
        (cdiv(count, rows * heads), heads),
        x.device,
        x,
        weight,
        bias,
        y,
        mean,
        rstd,
        count,
        layout.inner,
        layout.outer_stride,
        layout.inner_stride,
        eps,
        WIDTH=width,
        COLUMNS=columns,
        ROWS=rows,
        HEADS=heads,
        num_warps=warps,
    )
    return y, mean, rstd


def _empty_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight = torch.empty_like(weight) if need_dweight and weight is not None else x.new_empty(0)
    dbias = torch.empty_like(bias) if need_dbias and bias is not None else x.new_empty(0)
    return dx, dweight, dbias


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = _empty_backward(dy, x, weight, bias, mean, rstd, need_dx, need_dweight, need_dbias)
    dx = gradients[0] if need_dx else None
    dweight = gradients[1] if need_dweight else None
    dbias = gradients[2] if need_dbias else None
    if x.numel() == 0:
        for gradient in gradients[1:]:
            gradient.zero_()
        return gradients
    if not _on_triton(x, weight, bias):
        _reference_backward(dy, x, weight, mean, rstd, dx, dweight, dbias)
        return gradients
    width, layout, count, heads = x.shape[-1], rows_of(x), rstd.numel(), _heads(weight)
    dy, dy_outer, dy_inner = in_rows(dy, layout)
    columns, rows, warps = tile_of(width)
    programs, stages = cdiv(count, rows * heads), 1
    parts: list[torch.Tensor | None] = [None, None]
    if need_dweight or need_dbias:
        limit, stages = persistent_grid(
            programs * heads, columns * rows, columns * rows * (x.itemsize + dy.itemsize), x.device
        )
        programs = min(programs, max(1, limit // heads))
        parts = [
            torch.empty((programs, heads, width), dtype=torch.float32, device=x.device) if needed else None
            for needed in (need_dweight, need_dbias)
        ]
    launch(
        _backward_kernel,
        (programs, heads),
        x.device,
        dy,
        x,
        weight,
        mean,
        rstd,
        dx,
        *parts,
        count,
        layout.inner,
        layout.outer_stride,
        layout.inner_stride,
        dy_outer,
        dy_inner,
        WIDTH=width,
        COLUMNS=columns,
        ROWS=rows,
        HEADS=heads,
        STAGES=stages,
        num_warps=warps,
    )
    for parameter_gradient, part in zip(gradients[1:], parts, strict=True):
        if part is not None:
            # dbias [H] also sums over the heads of a two-dimensional weight.
            sum_partials(part.view(-1, *parameter_gradient.shape), parameter_gradient)
    return gradients


_layer_norm = register_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _empty_forward,
)
_layer_norm_backward = register_op(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool need_dx, "
    "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
)


# ----------------------------------------------------------------------------------------------------------- autograd


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        y, mean, rstd = _layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        gradients = _layer_norm_backward(dy, *ctx.saved_tensors, *needed)
        return (*(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm of the last dimension of `x`.

    Args:
        x: [..., H], any strides.
        weight: [H], [heads, H] where x is [..., heads, H], or None; frozen or trained.
        bias: [H] or None; frozen or trained.
        eps: added to the variance.

    Returns:
        y, of the shape and dtype of `x`.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"layer_norm needs rows of at least one element, got x {list(x.shape)}")
    for name, parameter in (("x", x), ("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if not parameter.is_floating_point():
            raise TypeError(f"layer_norm needs floating-point tensors, {name} is {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"x is on {x.device} and {name} on {parameter.device}")
    if weight is not None:
        if weight.ndim not in (1, 2) or weight.shape != x.shape[-weight.ndim :]:
            raise ValueError(
                f"weight must have the shape of the last one or two dimensions of x, got {list(weight.shape)}"
            )
        weight = weight.contiguous()
    if bias is not None:
        if bias.shape != x.shape[-1:]:
            raise ValueError(f"bias must have shape [{x.shape[-1]}], got {list(bias.shape)}")
        bias = bias.contiguous()
    if x.shape[-1] > MAX_WIDTH and use_triton(x):
        raise ValueError(f"layer_norm holds rows of at most {MAX_WIDTH} elements, got {x.shape[-1]}")
    # The heads of a two-dimensional weight must alternate row by row.
    x = x.contiguous() if weight is not None and weight.ndim == 2 else with_rows(x)
    return _LayerNorm.apply(x, weight, bias, eps)
