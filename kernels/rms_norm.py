"""RMSNorm over the last dimension, forward and backward.

Formula, with statistics in float32 whatever the dtype of x:

    rstd = 1 / sqrt(mean(x^2) + eps)              h = x * rstd
    y    = weight * h.to(x.dtype)                 round_before_weight: Llama, Mistral, Qwen, Phi-3, GLM, ...
    y    = (h * (weight + offset)).to(x.dtype)    otherwise: OLMo 2, gpt-oss (offset 0), Gemma (offset 1), Gemma 4

    g  = dy * (weight + offset)
    dx = rstd * (g - h * mean(g * h))             dweight = sum over rows of dy * h

The backward rounds once, at the end; it does not repeat the roundings that autograd makes on the way.

Shapes: x [..., H], weight [H] or None, y like x, rstd x.shape[:-1]. x may be any view whose rows are contiguous and
lie two strides apart (heads of a packed projection, transposed or not); any other view is copied first.
Dtypes: float16, bfloat16, float32 in any mix; float64 takes the torch reference. y has dtype promote(weight, x) with
round_before_weight, else that of x. dweight is summed in float32 per program and added up in a fixed order: no
atomics.

Floor, for T rows of e-byte elements: forward 2*T*H*e + 4*T bytes, backward 3*T*H*e + 4*T. A trained weight adds 8*P*H
for the P partial sums; a frozen one adds nothing.

Raises TypeError for dtypes that are not floating point, ValueError for shapes, devices or options that do not fit and
for H > 65536 where Triton runs.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); gradient by the chain rule; order of
roundings as in the modelling code of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import (
    cdiv,
    in_rows,
    launch,
    multiprocessors,
    once_differentiable,
    register_op,
    rows_of,
    use_triton,
    with_rows,
)

MAX_WIDTH = 65536  # a program holds whole rows in registers


# ---------------------------------------------------------------------------------------------------- torch reference


def _reference_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    y: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fills `y` and `rstd`; computes in the dtype of `rstd`."""
    wide = x.to(rstd.dtype)
    torch.rsqrt(wide.square().mean(-1).add_(eps), out=rstd)
    normed = wide * rstd.unsqueeze(-1)
    if weight is None:
        y.copy_(normed)
    elif round_before_weight:
        torch.mul(normed.to(x.dtype), weight, out=y)
    else:
        torch.mul(normed, weight.to(rstd.dtype) + weight_offset, out=y)


def _reference_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
) -> None:
    """Fills those of `dx` and `dweight` that are wanted."""
    gradient = dy.to(rstd.dtype)
    normed = x.to(rstd.dtype) * rstd.unsqueeze(-1)
    if dweight is not None:
        dweight.copy_((gradient * normed).reshape(-1, x.shape[-1]).sum(0))
    if dx is not None:
        if weight is not None:
            gradient = gradient * (weight.to(rstd.dtype) + weight_offset)
        projection = (gradient * normed).mean(-1, keepdim=True)
        torch.mul(gradient - normed * projection, rstd.unsqueeze(-1), out=dx)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    inner,
    x_outer,
    x_inner,
    eps,
    weight_offset,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] of whole rows per program. y and rstd are dense in the row order of x."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    valid = row < rows
    mask = valid[:, None] & (column < WIDTH)[None, :]
    x_row = row // inner * x_outer + row % inner * x_inner
    x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0)
    wide = x.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1) * (1.0 / WIDTH)
    # The approximate rsqrt is off by up to 2 ulp, which the whole row would share.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    tl.store(rstd_ptr + row, rstd, mask=valid)
    y = wide * rstd[:, None]
    if weight_ptr is not None:
        # Every program reads the weight: keep it in L1.
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0, eviction_policy="evict_last")
        weight = weight.to(tl.float32)[None, :]
        if ROUND_FIRST:
            y = y.to(x.dtype).to(tl.float32) * weight
        else:
            y = y * (weight + weight_offset)
    tl.store(y_ptr + row[:, None] * WIDTH + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    rows,
    inner,
    x_outer,
    x_inner,
    dy_outer,
    dy_inner,
    weight_offset,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program walks every num_programs-th tile; dweight_ptr [num_programs, WIDTH] gets its part of dweight."""
    column = tl.arange(0, COLUMNS)
    in_row = column < WIDTH
    if weight_ptr is not None and dx_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_row, other=0.0, eviction_policy="evict_last")
        weight = weight.to(tl.float32)[None, :] + weight_offset
    if dweight_ptr is not None:
        dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        mask = valid[:, None] & in_row[None, :]
        x_row = row // inner * x_outer + row % inner * x_inner
        dy_row = row // inner * dy_outer + row % inner * dy_inner
        x = tl.load(x_ptr + x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]
        normed = x * rstd
        if dweight_ptr is not None:
            dweight += dy * normed
        if dx_ptr is not None:
            gradient = dy
            if weight_ptr is not None:
                gradient = dy * weight
            projection = tl.sum(gradient * normed, axis=1) * (1.0 / WIDTH)
            dx = (gradient - normed * projection[:, None]) * rstd
            tl.store(dx_ptr + row[:, None] * WIDTH + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        partial = tl.program_id(0).to(tl.int64) * WIDTH + column
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=in_row)


def tile_of(width: int) -> tuple[int, int, int]:
    """Columns, rows and warps of a tile of whole rows: 4096 elements or more, 16 per thread until the warps run out."""
    columns = max(16, 1 << (width - 1).bit_length())
    rows = max(1, 4096 // columns)
    warps = min(columns * rows // 512, 16 if columns < MAX_WIDTH else 32)
    return columns, rows, warps


def persistent_grid(tiles: int, elements: int, tile_bytes: int, device: torch.device) -> tuple[int, int]:
    """Programs and pipeline stages of a loop over tiles of `elements`, which read `tile_bytes` each.

    Few programs keep the partial sums few; stages keep more bytes in flight than the 23 KiB per multiprocessor that
    saturate an H200. Measured there, backward with a trained weight in bfloat16: 4096 x 4096 0.035 ms with 2 programs
    per multiprocessor and 3 stages (0.036 with 4, 0.038 with 1 program); 8192 x 8192 0.105 ms with 1 program and 3
    stages (0.164 with 2 programs and 2 stages, which run out of registers).
    """
    programs = (2 if elements < 8192 else 1) * multiprocessors(device)
    return min(tiles, programs), max(1, min(3, 98304 // tile_bytes))


@triton.jit
def _sum_partials_kernel(partials_ptr, total_ptr, programs, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, programs, ROWS):
        in_tile = (start + row < programs)[:, None] & (column < width)[None, :]
        offsets = (start + row).to(tl.int64)[:, None] * width + column[None, :]
        total += tl.sum(tl.load(partials_ptr + offsets, mask=in_tile, other=0.0), axis=0)
    tl.store(total_ptr + column, total.to(total_ptr.dtype.element_ty), mask=column < width)


def sum_partials(partials: torch.Tensor, total: torch.Tensor) -> None:
    """total = partials.sum(0), in a fixed order and in one launch; partials [programs, ...] fp32, total contiguous."""
    width = total.numel()
    launch(
        _sum_partials_kernel,
        (cdiv(width, 32),),
        total.device,
        partials,
        total,
        len(partials),
        width,
        COLUMNS=32,
        ROWS=64,
    )


# ---------------------------------------------------------------------------------------------------------------- ops


def _empty_forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = x.dtype
    if round_before_weight and weight is not None:
        dtype = torch.promote_types(weight.dtype, dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty_like(x, dtype=dtype)
    # One value per row, in the order in which the rows lie; the indexing costs host time.
    rstd = x.new_empty(x.shape[:-1], dtype=wide) if x.is_contiguous() else torch.empty_like(x.select(-1, 0), dtype=wide)
    return y, rstd


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y, rstd = _empty_forward(x, weight, eps, weight_offset, round_before_weight)
    if x.numel() == 0:
        return y, rstd
    if not (use_triton(x) and (weight is None or use_triton(weight))):
        _reference_forward(x, weight, eps, weight_offset, round_before_weight, y, rstd)
        return y, rstd
    width, layout, count = x.shape[-1], rows_of(x), rstd.numel()
    columns, rows, warps = tile_of(width)
    launch(
        _forward_kernel,
        (cdiv(count, rows),),
        x.device,
        x,
        weight,
        y,
        rstd,
        count,
        layout.inner,
        layout.outer_stride,
        layout.inner_stride,
        eps,
        weight_offset,
        WIDTH=width,
        COLUMNS=columns,
        ROWS=rows,
        ROUND_FIRST=round_before_weight,
        num_warps=warps,
    )
    return y, rstd


def _empty_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight = torch.empty_like(weight) if need_dweight and weight is not None else x.new_empty(0)
    return dx, dweight


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    gradients = _empty_backward(dy, x, weight, rstd, weight_offset, need_dx, need_dweight)
    dx = gradients[0] if need_dx else None
    dweight = gradients[1] if need_dweight else None
    if x.numel() == 0:
        if dweight is not None:
            dweight.zero_()
        return gradients
    if not (use_triton(x) and (weight is None or use_triton(weight))):
        _reference_backward(dy, x, weight, rstd, weight_offset, dx, dweight)
        return gradients
    width, layout, count = x.shape[-1], rows_of(x), rstd.numel()
    dy, dy_outer, dy_inner = in_rows(dy, layout)
    columns, rows, warps = tile_of(width)
    programs, stages, partials = cdiv(count, rows), 1, None
    if dweight is not None:
        programs, stages = persistent_grid(
            programs, columns * rows, columns * rows * (x.itemsize + dy.itemsize), x.device
        )
        partials = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel,
        (programs,),
        x.device,
        dy,
        x,
        weight,
        rstd,
        dx,
        partials,
        count,
        layout.inner,
        layout.outer_stride,
        layout.inner_stride,
        dy_outer,
        dy_inner,
        weight_offset,
        WIDTH=width,
        COLUMNS=columns,
        ROWS=rows,
        STAGES=stages,
        num_warps=warps,
    )
    if dweight is not None and partials is not None:
        sum_partials(partials, dweight)
    return gradients


_rms_norm = register_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset, bool round_before_weight) -> (Tensor, Tensor)",
    _forward,
    _empty_forward,
)
_rms_norm_backward = register_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float weight_offset, bool need_dx, "
    "bool need_dweight) -> (Tensor, Tensor)",
    _backward,
    _empty_backward,
)


# ----------------------------------------------------------------------------------------------------------- autograd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        weight_offset: float,
        round_before_weight: bool,
    ) -> torch.Tensor:
        y, rstd = _rms_norm(x, weight, eps, weight_offset, round_before_weight)
        ctx.save_for_backward(x, weight, rstd)
        ctx.weight_offset = weight_offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        dx, dweight = _rms_norm_backward(dy, x, weight, rstd, ctx.weight_offset, need_dx, need_dweight)
        return dx if need_dx else None, dweight if need_dweight else None, None, None, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> torch.Tensor:
    """RMSNorm of the last dimension of `x`.

    Args:
        x: [..., H], any strides.
        weight: [H] or None; frozen or trained.
        eps: added to the mean square.
        weight_offset: added to the weight before it multiplies (Gemma stores weight - 1).
        round_before_weight: round the normalised x to its dtype, then multiply by the weight (Llama) rather than round
            the product (OLMo 2, Gemma).

    Returns:
        y, of the shape and memory order of `x`.
    """
    if not x.is_floating_point() or (weight is not None and not weight.is_floating_point()):
        raise TypeError("rms_norm needs floating-point x and weight")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"rms_norm needs rows of at least one element, got x {list(x.shape)}")
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight must have shape [{x.shape[-1]}], got {list(weight.shape)}")
        if weight.device != x.device:
            raise ValueError(f"x is on {x.device} and weight on {weight.device}")
        if round_before_weight and weight_offset != 0.0:
            raise ValueError("round_before_weight takes no weight_offset: no model rounds before adding it")
        weight = weight.contiguous()
    if x.shape[-1] > MAX_WIDTH and use_triton(x):
        raise ValueError(f"rms_norm holds rows of at most {MAX_WIDTH} elements, got {x.shape[-1]}")
    return _RMSNorm.apply(with_rows(x), weight, eps, weight_offset, round_before_weight)
