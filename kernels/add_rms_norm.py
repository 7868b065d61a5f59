"""Residual addition and RMSNorm in one pass, forward and backward.

Formula, with statistics in float32 whatever the dtypes:

    h    = residual + branch                      rounded to promote(residual, branch), as torch's addition
    y    = rms_norm(h)                            of the rounded h; the variants of rms_norm.py
    n(g) = rstd * (g - h * rstd * mean(g * h * rstd))        g = dy * (weight + offset)

    dresidual = dbranch = dh + n(g)               dweight = sum over rows of dy * h * rstd

The branch may be left out: h is then the residual itself, and what is gained is backward, where the gradient of the
residual stream is added in the pass that makes the norm's. Backward rounds once; autograd rounds the norm's gradient
and then the sum.

y may be asked for in another dtype: under autocast a norm of float32 hidden states makes a float32 y, which every
linear layer behind it casts to 16 bits. Written in 16 bits at once it is the same number.

Shapes: residual, branch, h, y [..., H]; weight [H] or None; rstd [...]. Rows are contiguous, or copied first.
Dtypes: float16, bfloat16, float32 in any mix; float64 takes the torch reference. dresidual and dbranch are one tensor
where their dtypes are one. dweight is summed in float32 per program and added up in a fixed order: no atomics.

Floor, for T rows of e-byte elements: forward 4*T*H*e + 4*T bytes (2*T*H*e without a branch), backward 4*T*H*e + 4*T. A
trained weight adds 8*P*H for the P partial sums.

Raises TypeError for dtypes that are not floating point, ValueError for shapes or options that do not fit and for
H > 65536 where Triton runs.

Source: the chain rule; order of roundings as in the modelling code of transformers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import cdiv, launch, once_differentiable, register_op, use_triton
from .rms_norm import MAX_WIDTH, _reference_forward, persistent_grid, sum_partials, tile_of
from .rms_norm import _reference_backward as _reference_backward_of_norm


class Norm(NamedTuple):
    """Which norm: see `rms_norm`."""

    eps: float
    weight_offset: float = 0.0
    round_before_weight: bool = False


# ---------------------------------------------------------------------------------------------------- torch reference


def _reference_backward(
    dh: torch.Tensor | None,
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    dresidual: torch.Tensor | None,
    dbranch: torch.Tensor | None,
    dweight: torch.Tensor | None,
) -> None:
    """Fills those of the last three that are wanted."""
    dx = None if dresidual is None and dbranch is None else torch.empty_like(h, dtype=rstd.dtype)
    _reference_backward_of_norm(dy, h, weight, rstd, weight_offset, dx, dweight)
    if dx is None:
        return
    if dh is not None:
        dx += dh
    for out in (dresidual, dbranch):
        if out is not None:
            out.copy_(dx)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _forward_kernel(
    residual_ptr,
    branch_ptr,
    weight_ptr,
    h_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    eps,
    weight_offset,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] of whole rows per program; the arithmetic of rms_norm.py, for the same bits."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    valid = row < rows
    mask = valid[:, None] & (column < WIDTH)[None, :]
    offsets = row[:, None] * WIDTH + column[None, :]
    h = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = (h.to(tl.float32) + branch).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, h, mask=mask)
    wide = h.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1) * (1.0 / WIDTH)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    tl.store(rstd_ptr + row, rstd, mask=valid)
    y = wide * rstd[:, None]
    if weight_ptr is not None:
        # Every program reads the weight: keep it in L1.
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0, eviction_policy="evict_last")
        if ROUND_FIRST:
            # As in stock: rounded in the dtype of the product before what comes after it rounds again.
            product = y.to(h.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
            if h.dtype == weight.dtype:
                product = product.to(h.dtype)
            y = product.to(tl.float32)
        else:
            y = (y * (weight.to(tl.float32)[None, :] + weight_offset)).to(h.dtype).to(tl.float32)
    else:
        y = y.to(h.dtype).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dh_ptr,
    dy_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dbranch_ptr,
    dweight_ptr,
    rows,
    weight_offset,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program walks every num_programs-th tile; dweight_ptr [num_programs, WIDTH] gets its part of dweight."""
    column = tl.arange(0, COLUMNS)
    in_row = column < WIDTH
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_row, other=0.0, eviction_policy="evict_last")
        weight = weight.to(tl.float32)[None, :] + weight_offset
    if dweight_ptr is not None:
        dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        mask = valid[:, None] & in_row[None, :]
        offsets = row[:, None] * WIDTH + column[None, :]
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]
        normed = h * rstd
        if dweight_ptr is not None:
            dweight += dy * normed
        if dresidual_ptr is not None or dbranch_ptr is not None:
            gradient = dy
            if weight_ptr is not None:
                gradient = dy * weight
            projection = tl.sum(gradient * normed, axis=1) * (1.0 / WIDTH)
            dx = (gradient - normed * projection[:, None]) * rstd
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + offsets, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
            if dbranch_ptr is not None:
                tl.store(dbranch_ptr + offsets, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        partial = tl.program_id(0).to(tl.int64) * WIDTH + column
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=in_row)


# ---------------------------------------------------------------------------------------------------------------- ops


def dtype_of(h: torch.dtype, weight: torch.Tensor | None, round_before_weight: bool) -> torch.dtype:
    """The dtype that stock code gives y."""
    return torch.promote_types(weight.dtype, h) if round_before_weight and weight is not None else h


def _empty_forward(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    if branch is None:
        h = residual.new_empty(0)
    else:
        h = torch.empty_like(residual, dtype=torch.promote_types(residual.dtype, branch.dtype))
        wide = torch.promote_types(h.dtype, wide)
    return h, torch.empty_like(residual, dtype=dtype), residual.new_empty(residual.shape[:-1], dtype=wide)


def _forward(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, y, rstd = _empty_forward(residual, branch, weight, eps, weight_offset, round_before_weight, dtype)
    if residual.numel() == 0:
        return h, y, rstd
    if not all(use_triton(each) for each in (residual, branch, weight) if each is not None):
        x = residual if branch is None else torch.add(residual, branch, out=h)
        stock = dtype_of(x.dtype, weight, round_before_weight)
        exact = y if stock == dtype else torch.empty_like(x, dtype=stock)
        _reference_forward(x, weight, eps, weight_offset, round_before_weight, exact, rstd)
        if exact is not y:
            y.copy_(exact)
        return h, y, rstd
    width, count = residual.shape[-1], rstd.numel()
    columns, rows, warps = tile_of(width)
    launch(
        _forward_kernel,
        (cdiv(count, rows),),
        residual.device,
        residual,
        branch,
        weight,
        h,
        y,
        rstd,
        count,
        eps,
        weight_offset,
        WIDTH=width,
        COLUMNS=columns,
        ROWS=rows,
        ROUND_FIRST=round_before_weight,
        num_warps=warps,
    )
    return h, y, rstd


def _empty_backward(
    dh: torch.Tensor | None,
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    residual_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nothing = h.new_empty(0)
    return (
        nothing if residual_dtype is None else torch.empty_like(h, dtype=residual_dtype),
        nothing.clone() if branch_dtype is None else torch.empty_like(h, dtype=branch_dtype),
        torch.empty_like(weight) if need_dweight and weight is not None else nothing.clone(),
    )


def _backward(
    dh: torch.Tensor | None,
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    residual_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = _empty_backward(dh, dy, h, weight, rstd, weight_offset, residual_dtype, branch_dtype, need_dweight)
    dresidual = None if residual_dtype is None else gradients[0]
    dbranch = None if branch_dtype is None else gradients[1]
    dweight = gradients[2] if need_dweight and weight is not None else None
    if h.numel() == 0:
        if dweight is not None:
            dweight.zero_()
        return gradients
    if not all(use_triton(each) for each in (h, weight) if each is not None):
        _reference_backward(dh, dy, h, weight, rstd, weight_offset, dresidual, dbranch, dweight)
        return gradients
    dh, dy = None if dh is None else dh.contiguous(), dy.contiguous()
    width, count = h.shape[-1], rstd.numel()
    columns, rows, warps = tile_of(width)
    programs, stages, partials = cdiv(count, rows), 1, None
    if dweight is not None:
        bytes_in = h.itemsize + dy.itemsize + (0 if dh is None else dh.itemsize)
        programs, stages = persistent_grid(programs, columns * rows, columns * rows * bytes_in, h.device)
        partials = torch.empty((programs, width), dtype=torch.float32, device=h.device)
    launch(
        _backward_kernel,
        (programs,),
        h.device,
        dh,
        dy,
        h,
        weight,
        rstd,
        dresidual,
        dbranch,
        partials,
        count,
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


_add_rms_norm = register_op(
    "add_rms_norm(Tensor residual, Tensor? branch, Tensor? weight, float eps, float weight_offset, "
    "bool round_before_weight, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    _empty_forward,
)
_add_rms_norm_backward = register_op(
    "add_rms_norm_backward(Tensor? dh, Tensor dy, Tensor h, Tensor? weight, Tensor rstd, float weight_offset, "
    "ScalarType? residual_dtype, ScalarType? branch_dtype, bool need_dweight) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
)


def normed(h: torch.Tensor, weight: torch.Tensor | None, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """y of an h, made again: the bits that `add_rms_norm` made. Nothing is recorded."""
    return _add_rms_norm(h, None, weight, *norm, dtype)[1]


# ----------------------------------------------------------------------------------------------------------- autograd


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        branch: torch.Tensor | None,
        weight: torch.Tensor | None,
        norm: Norm,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h, y, rstd = _add_rms_norm(residual, branch, weight, *norm, dtype)
        if branch is None:
            # The residual under another name, so that both of its gradients arrive here. It shares the version counter:
            # what is changed in place is seen.
            h = residual.detach()
        ctx.save_for_backward(h, weight, rstd)
        ctx.weight_offset = norm.weight_offset
        ctx.dtypes = residual.dtype, None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor | None, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        need_residual, need_branch, need_weight = ctx.needs_input_grad[:3]
        residual_dtype, branch_dtype = ctx.dtypes
        if dy is None:
            if dh is None:
                return None, None, None, None, None
            dresidual = dh.to(residual_dtype) if need_residual else None
            return dresidual, dh.to(branch_dtype) if need_branch else None, None, None, None
        h, weight, rstd = ctx.saved_tensors
        # One tensor for both where they are of one dtype, as torch's addition hands out.
        shared = need_residual and need_branch and residual_dtype == branch_dtype
        dresidual, dbranch, dweight = _add_rms_norm_backward(
            dh,
            dy,
            h,
            weight,
            rstd,
            ctx.weight_offset,
            residual_dtype if need_residual else None,
            branch_dtype if need_branch and not shared else None,
            need_weight,
        )
        return (
            dresidual if need_residual else None,
            (dresidual if shared else dbranch) if need_branch else None,
            dweight if need_weight else None,
            None,
            None,
        )


def add_rms_norm(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    norm: Norm,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = residual + branch, and the RMSNorm of h.

    Args:
        residual: [..., H].
        branch: of the same shape, or None: h is the residual, which must then not be used but through it.
        weight: [H] or None; frozen or trained.
        norm: eps and variant.
        dtype: of y; default: that of stock code.

    Returns:
        h and y.
    """
    tensors = [each for each in (residual, branch, weight) if each is not None]
    if not all(each.is_floating_point() for each in tensors):
        raise TypeError("add_rms_norm needs floating-point tensors")
    if residual.ndim == 0 or residual.shape[-1] == 0:
        raise ValueError(f"add_rms_norm needs rows of at least one element, got {list(residual.shape)}")
    if branch is not None and branch.shape != residual.shape:
        raise ValueError(f"residual and branch must have one shape, got {list(residual.shape)}, {list(branch.shape)}")
    if weight is not None and weight.shape != residual.shape[-1:]:
        raise ValueError(f"weight must have shape [{residual.shape[-1]}], got {list(weight.shape)}")
    if any(each.device != residual.device for each in tensors):
        raise ValueError("residual, branch and weight must be on one device")
    if norm.round_before_weight and norm.weight_offset != 0.0:
        raise ValueError("round_before_weight takes no weight_offset: no model rounds before adding it")
    if residual.shape[-1] > MAX_WIDTH and use_triton(residual):
        raise ValueError(f"add_rms_norm holds rows of at most {MAX_WIDTH} elements, got {residual.shape[-1]}")
    if branch is not None:
        branch = branch.contiguous()
    if weight is not None:
        weight = weight.contiguous()
    if dtype is None:
        h = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
        dtype = dtype_of(h, weight, norm.round_before_weight)
    return _AddRMSNorm.apply(residual.contiguous(), branch, weight, norm, dtype)
