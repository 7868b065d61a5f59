"""Linear layers with weight-decomposed adapters (DoRA) and frozen weights, several on one input, forward and backward.

Formula, for the projections i of one input x, with S_i = s_i * x @ A_i^T as in lora.py:

    n_i = norms of the rows of W_i + s_i * B_i @ A_i, a constant for gradients
    u_i = x @ W_i^T + S_i @ B_i^T                y_i = u_i * (m_i / n_i) + bias_i

    du_i = dy_i * (m_i / n_i)                    dm_i = sum over rows of dy_i * u_i / n_i
    dS_i, dx, dB_i, dA_i, dbias_i as in lora.py, from du_i for dy_i; dbias_i = sum over rows of dy_i

Three kernels do what is not a product with W or of low rank. The norms are taken in one pass over W, which adds the
adapter to each tile: no N x K matrix is written, and nothing cancels, as it would in |W|^2 + 2 s W A^T . B + ... . u is
never written either: one kernel makes y from the product with W, S and B, and one makes du, dm from dy and those.
So y is rounded after the product and at its end, as in stock; stored in bfloat16, u would add 22 % to the error.

The norms are taken anew at each call, although they change with the optimizer's steps only: nothing tells safely that
W, A and B are those of the last call (writes through `.data`, and kernels outside of torch, count no version), and
a pass over W is short beside the product with it.

Shapes: as in lora.py; m_i [N_i]. Dtypes: as in lora.py; m_i floating point; n_i float32. u, y and dm are computed in
float32, from S, A and B in `low`; dm is summed in float32 per program and added up in a fixed order: no atomics.

Floor, for T rows of e-byte elements, beyond the products with W and those of lora.py: forward N*K*e + 2*T*N*e bytes,
backward 3*T*N*e for each projection.

Raises ValueError for shapes that do not fit and for dropout, whose formula is another one (PEFT applies it to the input
of W as well); TypeError for weights that require a gradient.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), with the norm detached as in its section 4.3;
gradients by the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import cdiv, launch, multiprocessors, once_differentiable, register_op, use_triton
from .lora import (
    MAX_RANK_BLOCK,
    Projection,
    Static,
    adapter_gradients,
    add_input_gradient,
    add_low_rank,
    bias_gradient,
    check,
    dense,
    linear,
    low_rank_add_,
    low_rank_gradients,
    low_rank_inputs,
    rank_block,
    static_of,
    tensors_of,
)
from .rms_norm import sum_partials

# ---------------------------------------------------------------------------------------------------- torch reference

# Products are in place, as autocast, under which the forward may be called, would round all others to its dtype.


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _reference_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    wide = _wide(weight, a, b)
    adapted = weight.to(wide, copy=True).addmm_(b.to(wide), a.to(wide), alpha=scaling)
    return torch.linalg.vector_norm(adapted, dim=1)


def _reference_forward(
    base: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor,
    n: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """Fills `y`, rounded once."""
    wide = _wide(base, s, m, n)
    u = base.to(wide, copy=True).addmm_(s.to(wide), b.to(wide).t()).mul_(m.to(wide) / n.to(wide))
    y.copy_(u if bias is None else u.add_(bias))


def _reference_backward(
    dy: torch.Tensor,
    base: torch.Tensor | None,
    s: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor,
    n: torch.Tensor,
    du: torch.Tensor | None,
    low: torch.Tensor | None,
    dm: torch.Tensor,
) -> None:
    """Fills those of `du` and `low` that are given, and `dm` where `base` is given."""
    wide = _wide(dy, s, m, n)
    gradient, n = dy.to(wide), n.to(wide)
    if base is not None:
        u = base.to(wide, copy=True).addmm_(s.to(wide), b.to(wide).t())
        dm.copy_((gradient * u).sum(0).div_(n))
    if du is None and low is None:
        return
    scaled = gradient * (m.to(wide) / n)
    for each in (du, low):
        if each is not None:
            each.copy_(scaled)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _norms_kernel(
    weight_ptr,
    a_ptr,
    b_ptr,
    n_ptr,
    outputs,
    width,
    rank,
    weight_row,
    a_row,
    b_row,
    scaling,
    RANK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Norms of BLOCK_N rows of the weight per program, BLOCK_K columns a step.

    Products are of float32 on the ordinary cores: tensor cores cut sums off instead of rounding them, and a norm adds
    that up. Where the adapter nearly undoes the weight, it was 2.8 times as far off as stock's (H200).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = (row < outputs)[:, None]
    ranks = tl.arange(0, RANK)
    if ONE_BLOCK:
        b_mask = in_rows & (ranks < rank)[None, :]
        b = tl.load(b_ptr + row[:, None] * b_row + ranks[None, :], mask=b_mask, other=0.0).to(tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK_K)
        in_width = (column < width)[None, :]
        weight = tl.load(
            weight_ptr + row[:, None] * weight_row + column[None, :],
            mask=in_rows & in_width,
            other=0.0,
            eviction_policy="evict_first",
        )
        delta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if ONE_BLOCK:
            a = tl.load(
                a_ptr + ranks[:, None] * a_row + column[None, :],
                mask=(ranks < rank)[:, None] & in_width,
                other=0.0,
            ).to(tl.float32)
            delta = tl.dot(b, a, delta, input_precision="ieee")
        else:
            for start in range(0, rank, RANK):
                each = start + ranks
                b_mask = in_rows & (each < rank)[None, :]
                b = tl.load(b_ptr + row[:, None] * b_row + each[None, :], mask=b_mask, other=0.0).to(tl.float32)
                a = tl.load(
                    a_ptr + each[:, None] * a_row + column[None, :],
                    mask=(each < rank)[:, None] & in_width,
                    other=0.0,
                ).to(tl.float32)
                delta = tl.dot(b, a, delta, input_precision="ieee")
        adapted = weight.to(tl.float32) + scaling * delta
        squares += adapted * adapted
    tl.store(n_ptr + row, tl.sqrt_rn(tl.sum(squares, axis=1)), mask=row < outputs)


@triton.jit
def _forward_kernel(
    base_ptr,
    s_ptr,
    b_ptr,
    m_ptr,
    n_ptr,
    bias_ptr,
    y_ptr,
    rows,
    width,
    rank,
    s_stride,
    b_row,
    b_rank,
    blocks,
    RANK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = (base + s @ b^T) * (m / n) + bias, one tile per program; base and y are contiguous."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = column < width
    offset = row[:, None] * width + column[None, :]
    mask = (row < rows)[:, None] & in_width[None, :]
    u = tl.load(base_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    u = add_low_rank(
        u, s_ptr, s_stride, (row, row < rows), b_ptr, b_row, b_rank, (column, in_width), rank, RANK, ONE_BLOCK, IEEE
    )
    m = tl.load(m_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    n = tl.load(n_ptr + column, mask=in_width, other=1.0)
    y = u * tl.div_rn(m, n)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    base_ptr,
    s_ptr,
    b_ptr,
    m_ptr,
    n_ptr,
    du_ptr,
    low_ptr,
    dm_ptr,
    rows,
    width,
    rank,
    dy_stride,
    s_stride,
    b_row,
    b_rank,
    blocks,
    programs,
    RANK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program walks every programs-th tile of BLOCK_N columns; dm_ptr [programs, width] gets its part of dm."""
    program = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = column < width
    n = tl.load(n_ptr + column, mask=in_width, other=1.0)
    m = tl.load(m_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    factor = tl.div_rn(m, n)[None, :]
    if dm_ptr is not None:
        dm = tl.zeros((BLOCK_N,), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, BLOCK_T), programs, num_stages=STAGES):
        row = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        offset = row[:, None] * width + column[None, :]
        mask = (row < rows)[:, None] & in_width[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        du = dy * factor
        if du_ptr is not None:
            tl.store(du_ptr + offset, du.to(du_ptr.dtype.element_ty), mask=mask)
        if low_ptr is not None:
            tl.store(low_ptr + offset, du.to(low_ptr.dtype.element_ty), mask=mask)
        if dm_ptr is not None:
            u = tl.load(base_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            s_rows, b_rows = (row, row < rows), (column, in_width)
            u = add_low_rank(u, s_ptr, s_stride, s_rows, b_ptr, b_row, b_rank, b_rows, rank, RANK, ONE_BLOCK, IEEE)
            dm += tl.sum(dy * u, axis=0)
    if dm_ptr is not None:
        tl.store(dm_ptr + program.to(tl.int64) * width + column, tl.div_rn(dm, n), mask=in_width)


_BLOCK_T, _WARPS = 64, 4


def _ranks(rank: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Ranks per step of a tile's product, and whether one step is enough. More would not fit into the registers."""
    one_block = rank <= (16 if dtype == torch.float32 else MAX_RANK_BLOCK)
    return (rank_block(rank), True) if one_block else (32, False)


def _columns(dtype: torch.dtype) -> int:
    """Columns of a tile; products in float32 take registers for both operands."""
    return 64 if dtype == torch.float32 else 128


# ---------------------------------------------------------------------------------------------------------------- ops


def _norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    if weight.numel() == 0 or not (use_triton(weight) and use_triton(a)):
        return _reference_norms(weight, a, b, scaling)
    n = _empty_norms(weight, a, b, scaling)
    weight, a, b = (each if each.stride(1) == 1 else each.contiguous() for each in (weight, a, b))
    outputs, width = weight.shape
    rank, one_block = _ranks(a.shape[0], torch.float32)
    # Every program reads all of A, so that more rows are better, where there are enough for all multiprocessors.
    rows, columns = 16 if outputs < 4096 else 32, _columns(torch.float32)
    tile_bytes = (rows * weight.itemsize + rank * a.itemsize) * columns
    launch(
        _norms_kernel,
        (cdiv(outputs, rows),),
        n.device,
        weight,
        a,
        b,
        n,
        outputs,
        width,
        a.shape[0],
        weight.stride(0),
        a.stride(0),
        b.stride(0),
        scaling,
        RANK=rank,
        ONE_BLOCK=one_block,
        BLOCK_N=rows,
        BLOCK_K=columns,
        STAGES=max(1, min(4, 98304 // tile_bytes)),
        num_warps=_WARPS,
    )
    return n


def _empty_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.empty(weight.shape[0], dtype=_wide(weight, a, b), device=weight.device)


def _forward(
    base: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor,
    n: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    y = torch.empty_like(base, dtype=dtype)
    rows, width = base.shape
    if y.numel() == 0:
        return y
    if not (all(map(use_triton, (base, s, m, n, y))) and (bias is None or use_triton(bias))):
        _reference_forward(base, s, b, m, n, bias, y)
        return y
    columns, (rank, one_block) = _columns(s.dtype), _ranks(s.shape[1], s.dtype)
    blocks = cdiv(width, columns)
    launch(
        _forward_kernel,
        (cdiv(rows, _BLOCK_T) * blocks,),
        y.device,
        base,
        s,
        b,
        m,
        n,
        bias,
        y,
        rows,
        width,
        s.shape[1],
        s.stride(0),
        b.stride(0),
        b.stride(1),
        blocks,
        RANK=rank,
        ONE_BLOCK=one_block,
        IEEE=s.dtype == torch.float32,
        BLOCK_T=_BLOCK_T,
        BLOCK_N=columns,
        num_warps=_WARPS,
    )
    return y


def _empty_backward(
    dy: torch.Tensor,
    base: torch.Tensor | None,
    s: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor,
    n: torch.Tensor,
    du_dtype: torch.dtype | None,
    low_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    du, low = (
        dy.new_empty(0) if dtype is None else torch.empty(dy.shape, dtype=dtype, device=dy.device)
        for dtype in (du_dtype, low_dtype)
    )
    return du, low, m.new_empty(0) if base is None else torch.empty_like(m)


def _backward(
    dy: torch.Tensor,
    base: torch.Tensor | None,
    s: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor,
    n: torch.Tensor,
    du_dtype: torch.dtype | None,
    low_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = _empty_backward(dy, base, s, b, m, n, du_dtype, low_dtype)
    du = None if du_dtype is None else gradients[0]
    low, dm = None if low_dtype is None else gradients[1], gradients[2]
    rows, width = dy.shape
    if dy.numel() == 0:
        dm.zero_()
        return gradients
    if not all(map(use_triton, (dy, s, m, n, *gradients))):
        _reference_backward(dy, base, s, b, m, n, du, low, dm)
        return gradients
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    columns, (rank, one_block) = _columns(s.dtype), _ranks(s.shape[1], s.dtype)
    blocks, programs, stages, partials = cdiv(width, columns), cdiv(rows, _BLOCK_T), 1, None
    if base is not None:
        # Few programs keep the partial sums few; all but one stage lie in shared memory, for two programs at a time.
        programs = min(programs, max(1, 4 * multiprocessors(dy.device) // blocks))
        tile_bytes = _BLOCK_T * columns * (dy.itemsize + base.itemsize) + (_BLOCK_T + columns) * rank * s.itemsize
        stages = max(1, min(3, 1 + 98304 // tile_bytes))
        partials = torch.empty((programs, width), dtype=torch.float32, device=dy.device)
    launch(
        _backward_kernel,
        (programs * blocks,),
        dy.device,
        dy,
        base,
        s,
        b,
        m,
        n,
        du,
        low,
        partials,
        rows,
        width,
        s.shape[1],
        dy.stride(0),
        s.stride(0),
        b.stride(0),
        b.stride(1),
        blocks,
        programs,
        RANK=rank,
        ONE_BLOCK=one_block,
        IEEE=s.dtype == torch.float32,
        BLOCK_T=_BLOCK_T,
        BLOCK_N=columns,
        STAGES=stages,
        num_warps=_WARPS,
    )
    if partials is not None:
        sum_partials(partials, dm)
    return gradients


dora_norms = register_op("dora_norms(Tensor weight, Tensor a, Tensor b, float scaling) -> Tensor", _norms, _empty_norms)
_dora = register_op(
    "dora(Tensor base, Tensor s, Tensor b, Tensor m, Tensor n, Tensor? bias, ScalarType dtype) -> Tensor",
    _forward,
    lambda base, s, b, m, n, bias, dtype: torch.empty_like(base, dtype=dtype),
)
# du in up to two dtypes; dm only where `base` is given.
_dora_backward = register_op(
    "dora_backward(Tensor dy, Tensor? base, Tensor s, Tensor b, Tensor m, Tensor n, ScalarType? du_dtype, "
    "ScalarType? low_dtype) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
)


# ----------------------------------------------------------------------------------------------------------- autograd


class _DoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, static: Static, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        count, layout = len(static.weights), static.layout
        biases, a, b, m = (tensors[i * count : (i + 1) * count] for i in range(4))
        (stack,) = layout.stacks
        ctx.set_materialize_grads(False)
        ctx.static, ctx.shape, ctx.versions = static, x.shape, static.versions()
        x = x.reshape(-1, x.shape[-1])
        gathered = layout.gather(a, b)
        (adapters,) = layout.adapters(gathered)
        s = low_rank_inputs(x, adapters, ())
        need_m = ctx.needs_input_grad[2 + 3 * count :]
        outputs, bases, norms = [], [], []
        for i, (weight, expand, m_i) in enumerate(zip(static.weights, static.expand, m, strict=True)):
            full = dense(weight, expand, x.dtype, False)
            base = n = None
            each, b_i = stack.columns[i], adapters.b[i]
            if m_i is not None and b_i is not None:
                assert s is not None
                assert adapters.a is not None
                # Packed weights are expanded once for both; dense ones are not cast for the norms.
                wide = weight if expand is None else full
                n = dora_norms(wide, adapters.a[each], b_i, stack.scaling[i])
                base = linear(x, full, None, x.dtype)
                y = _dora(base, s[:, each], b_i, m_i, n, biases[i], static.out)
            else:
                y = linear(x, full, biases[i], static.out)
                if b_i is not None:
                    assert s is not None
                    low_rank_add_(y, s[:, each], b_i, 0.0, 0)
            del full
            outputs.append(y.view(*ctx.shape[:-1], y.shape[-1]))
            bases.append(base if need_m[i] else None)
            norms.append(n)
        ctx.save_for_backward(x, s, *m, *norms, *bases, *gathered)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: torch.Tensor | None) -> tuple[Any, ...]:
        static, count = ctx.static, len(output_gradients)
        static.check(ctx.versions)
        x, s, *rest = ctx.saved_tensors
        m, norms, bases = (rest[i * count : (i + 1) * count] for i in range(3))
        (adapters,) = static.layout.adapters(rest[3 * count :])
        b, stack = adapters.b, adapters.stack
        need_x, _, *need = ctx.needs_input_grad
        dtypes = static.wanted(need[: 3 * count])
        gradients: list[torch.Tensor | None] = [None] * (4 * count)
        dx = ds = None
        if s is not None and (need_x or any(need[count : 2 * count])):
            ds = (torch.empty_like if None not in output_gradients else torch.zeros_like)(s)
        for i, dy in enumerate(output_gradients):
            if dy is None:
                dtypes[count + i] = None
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            b_i, b_dtype, each = b[i], dtypes[2 * count + i], stack.columns[i]
            need_low = b_i is not None and (ds is not None or b_dtype is not None)
            if dtypes[i] is not None:
                gradients[i] = bias_gradient(dy, dtypes[i])
            if m[i] is None:
                low = du = dy.to(x.dtype)
            else:
                # du rounds to the dtype of the products with W; the low-rank ones may have more bits.
                du_dtype = x.dtype if need_x else None
                low_dtype = static.low if need_low and du_dtype != static.low else None
                du, low, dm = _dora_backward(dy, bases[i], s[:, each], b_i, m[i], norms[i], du_dtype, low_dtype)
                if low_dtype is None:
                    low = du
                gradients[3 * count + i] = dm if need[3 * count + i] else None
            if need_low:
                ds_i = None if ds is None else ds[:, each]
                gradients[2 * count + i] = adapter_gradients(low, s[:, each], b_i, stack.scaling[i], ds_i, b_dtype)
            del low
            if need_x:
                full = dense(static.weights[i], static.expand[i], x.dtype, True)
                dx = torch.mm(du, full) if dx is None else dx.addmm_(du, full)
                del full
        if ds is not None:
            wanted, none = dtypes[count : 2 * count], (0,) * count
            if any(wanted):
                gradients[count : 2 * count] = low_rank_gradients(x, ds, wanted, stack, none)
            if dx is not None:
                add_input_gradient(dx, ds, adapters, none)
        return None if dx is None else dx.view(ctx.shape), None, *gradients


def dora_linears_of(
    width: int,
    dtype: torch.dtype,
    projections: Sequence[Projection],
    magnitudes: Sequence[torch.Tensor | None],
    low: torch.dtype | None,
    out: torch.dtype | None,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """`dora_linears` of inputs of one width and dtype: checked once, called many times."""
    if not 1 <= len(projections) <= 3:
        raise ValueError(f"between one and three projections, got {len(projections)}")
    if len(magnitudes) != len(projections):
        raise ValueError(f"{len(projections)} projections and {len(magnitudes)} magnitudes")
    for projection, magnitude in zip(projections, magnitudes, strict=True):
        check(width, projection)
        if projection.dropout:
            raise ValueError("DoRA with dropout computes something else")
        if magnitude is None:
            continue
        if projection.b is None:
            raise ValueError("a magnitude needs an adapter")
        if magnitude.shape != projection.b.shape[:1]:
            raise ValueError(f"magnitude must be [{projection.b.shape[0]}], got {list(magnitude.shape)}")
    static, tensors = static_of(dtype, projections, low, out), tensors_of(projections)

    def linears(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dense_magnitudes = (m if m is None or m.is_contiguous() else m.contiguous() for m in magnitudes)
        return _DoRALinears.apply(x, static, *tensors, *dense_magnitudes)

    return linears


def dora_linears(
    x: torch.Tensor,
    projections: Sequence[Projection],
    magnitudes: Sequence[torch.Tensor | None],
    low: torch.dtype | None = None,
    out: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """All projections of one input.

    Args:
        x: [..., K], in the dtype to compute in; dense weights are cast to it.
        projections: three at most, each with a weight of K columns, without dropout.
        magnitudes: m_i, [N_i], of each; None for a projection that is as in `lora_linears`.
        low: dtype of the low-rank products; default: that of x.
        out: dtype of the outputs; default: that of x.

    Returns:
        One [..., N_i] for each.
    """
    return dora_linears_of(x.shape[-1], x.dtype, projections, magnitudes, low, out)(x)
