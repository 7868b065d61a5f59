"""RMSNorm of each head of queries and keys, and their rotary embedding, in one pass forward and one backward.

Formula, for a head x of D elements, computed in float32 and rounded once (modelling code rounds two or three times):

    y   = x * rstd * (weight + offset)         rstd = 1 / sqrt(mean(x^2) + eps)
    out = rotation of y by position: rope.py, half-rotate, all D elements

    dy  = transposed rotation of dout          n = x * rstd
    dx  = rstd * (g - n * mean(g * n))         g = dy * (weight + offset)
    dweight = sum over tokens and heads of dy * n

Shapes: q [B, heads, S, D] with unsqueeze_dim 1 or [B, S, heads, D] with 2, k alike with its own number of heads; D is
even; weights [D], one for all heads of q and one for those of k; cos and sin [B or 1, S, D]. Outputs and gradients are
dense in the memory order of the inputs. rstd is computed again in backward, where x is read anyway.
Dtypes: float16, bfloat16, float32 in any mix. Outputs have the dtype of modelling code, promote(y, cos). dweight is
summed in float32 per program and added up in a fixed order: no atomics.

Floor, for E = B * S * (q heads + k heads) * D elements of e bytes: 2*E*e forward, 3*E*e backward, plus cos and sin. Two
norms and a rotation of their own move 4*E*e and 5*E*e.

Where Triton does not run, rms_norm.py and rope.py compute it one after the other; they raise what does not fit.

Source: Su et al., "RoFormer" (2021); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); the chain rule.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import launch, multiprocessors, once_differentiable, register_op, use_triton
from .add_rms_norm import Norm, dtype_of
from .rms_norm import rms_norm, sum_partials
from .rope import _memory_order, _next_power_of_2, _tile_of, rope

MAX_WIDTH = 512  # of a head: more would not fit into the registers of a program

# Programs of backward for each multiprocessor: few, so that partial sums of weights' gradients are few.
_PROGRAMS = 8


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _angles(cos_ptr, sin_ptr, offset, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin of both halves of a token's heads, [1, PAIRS] each."""
    pair = tl.arange(0, PAIRS)
    mask = pair < HALF
    cos1 = tl.load(cos_ptr + offset + pair, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + offset + pair, mask=mask, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_ptr + offset + HALF + pair, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_ptr + offset + HALF + pair, mask=mask, other=0.0).to(tl.float32)[None, :]
    return cos1, sin1, cos2, sin2


@triton.jit
def _weights(weight_ptr, weight_offset, HALF: tl.constexpr, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)
    mask = pair < HALF
    first = tl.load(weight_ptr + pair, mask=mask, other=0.0).to(tl.float32)[None, :] + weight_offset
    second = tl.load(weight_ptr + HALF + pair, mask=mask, other=0.0).to(tl.float32)[None, :] + weight_offset
    return first, second


@triton.jit
def _normed(x_base, mask, eps, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Both halves of heads divided by their root mean square, [heads, PAIRS] each, and rstd [heads, 1]."""
    pair = tl.arange(0, PAIRS)[None, :]
    x1 = tl.load(x_base + pair, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_base + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1) * (0.5 / HALF)
    # As in rms_norm.py: the approximate rsqrt is off by up to 2 ulp, which the whole head would share.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
    return x1 * rstd, x2 * rstd, rstd


@triton.jit
def _forward_heads(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_head,
    out_head,
    cos1,
    sin1,
    cos2,
    sin2,
    eps,
    weight_offset,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """All heads of one token."""
    weight1, weight2 = _weights(weight_ptr, weight_offset, HALF, PAIRS)
    pair = tl.arange(0, PAIRS)[None, :]
    for start in tl.range(0, HEADS, BLOCK):
        head = (start + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        mask = (head < HEADS) & (pair < HALF)
        n1, n2, _ = _normed(x_ptr + head * x_head, mask, eps, HALF, PAIRS)
        y1 = n1 * weight1
        y2 = n2 * weight2
        out_base = out_ptr + head * out_head + pair
        tl.store(out_base, tl.fma(y1, cos1, -(y2 * sin1)).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_base + HALF, tl.fma(y2, cos2, y1 * sin2).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    q_out_batch,
    q_out_token,
    q_out_head,
    k_out_batch,
    k_out_token,
    k_out_head,
    cos_batch,
    cos_token,
    eps,
    weight_offset,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One token per program."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    cos1, sin1, cos2, sin2 = _angles(cos_ptr, sin_ptr, batch * cos_batch + token * cos_token, HALF, PAIRS)
    q_ptr += batch * q_batch + token * q_token
    q_out_ptr += batch * q_out_batch + token * q_out_token
    k_ptr += batch * k_batch + token * k_token
    k_out_ptr += batch * k_out_batch + token * k_out_token
    _forward_heads(
        q_ptr,
        q_weight_ptr,
        q_out_ptr,
        q_head,
        q_out_head,
        cos1,
        sin1,
        cos2,
        sin2,
        eps,
        weight_offset,
        Q_HEADS,
        Q_BLOCK,
        HALF,
        PAIRS,
    )
    _forward_heads(
        k_ptr,
        k_weight_ptr,
        k_out_ptr,
        k_head,
        k_out_head,
        cos1,
        sin1,
        cos2,
        sin2,
        eps,
        weight_offset,
        K_HEADS,
        K_BLOCK,
        HALF,
        PAIRS,
    )


@triton.jit
def _backward_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    dweight_ptr,
    all_tokens,
    tokens,
    dout_batch,
    dout_token,
    dout_head,
    x_batch,
    x_token,
    x_head,
    dx_batch,
    dx_token,
    dx_head,
    cos_batch,
    cos_token,
    eps,
    weight_offset,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Of queries, or of keys. Each program walks every num_programs-th token; dweight_ptr [num_programs, 2 * HALF] gets
    its part of dweight."""
    weight1, weight2 = _weights(weight_ptr, weight_offset, HALF, PAIRS)
    pair = tl.arange(0, PAIRS)[None, :]
    dweight1 = tl.zeros((BLOCK, PAIRS), tl.float32)
    dweight2 = tl.zeros((BLOCK, PAIRS), tl.float32)
    for place in tl.range(tl.program_id(0), all_tokens, tl.num_programs(0)):
        batch = (place // tokens).to(tl.int64)
        token = (place % tokens).to(tl.int64)
        cos1, sin1, cos2, sin2 = _angles(cos_ptr, sin_ptr, batch * cos_batch + token * cos_token, HALF, PAIRS)
        for start in tl.range(0, HEADS, BLOCK):
            head = (start + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
            mask = (head < HEADS) & (pair < HALF)
            n1, n2, rstd = _normed(x_ptr + batch * x_batch + token * x_token + head * x_head, mask, eps, HALF, PAIRS)
            dout_base = dout_ptr + batch * dout_batch + token * dout_token + head * dout_head + pair
            dout1 = tl.load(dout_base, mask=mask, other=0.0).to(tl.float32)
            dout2 = tl.load(dout_base + HALF, mask=mask, other=0.0).to(tl.float32)
            dy1 = tl.fma(dout1, cos1, dout2 * sin2)
            dy2 = tl.fma(dout2, cos2, -(dout1 * sin1))
            if dweight_ptr is not None:
                dweight1 += dy1 * n1
                dweight2 += dy2 * n2
            dy1 *= weight1
            dy2 *= weight2
            projection = tl.sum(dy1 * n1 + dy2 * n2, axis=1)[:, None] * (0.5 / HALF)
            dx_base = dx_ptr + batch * dx_batch + token * dx_token + head * dx_head + pair
            tl.store(dx_base, ((dy1 - n1 * projection) * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
            tl.store(dx_base + HALF, ((dy2 - n2 * projection) * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        column = tl.arange(0, PAIRS)
        partial = dweight_ptr + tl.program_id(0).to(tl.int64) * (2 * HALF) + column
        tl.store(partial, tl.sum(dweight1, axis=0), mask=column < HALF)
        tl.store(partial + HALF, tl.sum(dweight2, axis=0), mask=column < HALF)


# ---------------------------------------------------------------------------------------------------------------- ops


def _strides(x: torch.Tensor, heads_dim: int) -> tuple[int, int, int]:
    """Of batch, token and head."""
    strides = x.stride()
    return strides[0], strides[3 - heads_dim], strides[heads_dim]


def _strides_of_angles(cos: torch.Tensor) -> tuple[int, int]:
    return cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


def _empty(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    weight_offset: float,
    heads_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = (torch.empty_permuted(x.shape, _memory_order(x), dtype=dtype, device=x.device) for x in (q, k))
    return q_out, k_out


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    weight_offset: float,
    heads_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = _empty(q, k, q_weight, k_weight, cos, sin, eps, weight_offset, heads_dim, dtype)
    half, tokens = q.shape[3] // 2, q.shape[3 - heads_dim]
    pairs = _next_power_of_2(half)
    (q_block, q_warps), (k_block, k_warps) = (_tile_of(x.shape[heads_dim], pairs) for x in (q, k))
    launch(
        _forward_kernel,
        (q.shape[0] * tokens,),
        q.device,
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        q_out,
        k_out,
        tokens,
        *(stride for x in (q, k, q_out, k_out) for stride in _strides(x, heads_dim)),
        *_strides_of_angles(cos),
        eps,
        weight_offset,
        Q_HEADS=q.shape[heads_dim],
        K_HEADS=k.shape[heads_dim],
        Q_BLOCK=q_block,
        K_BLOCK=k_block,
        HALF=half,
        PAIRS=pairs,
        num_warps=max(q_warps, k_warps),
    )
    return q_out, k_out


def _empty_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    weight_offset: float,
    heads_dim: int,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_permuted(x.shape, _memory_order(x), dtype=x.dtype, device=x.device)
    return dx, torch.empty_like(weight) if need_dweight else weight.new_empty(0)


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    weight_offset: float,
    heads_dim: int,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = _empty_backward(dout, x, weight, cos, sin, eps, weight_offset, heads_dim, need_dweight)
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    half, tokens = x.shape[3] // 2, x.shape[3 - heads_dim]
    pairs, all_tokens = _next_power_of_2(half), x.shape[0] * tokens
    block, warps = _tile_of(x.shape[heads_dim], pairs)
    programs = min(all_tokens, _PROGRAMS * multiprocessors(x.device))
    partials = x.new_empty((programs, 2 * half), dtype=torch.float32) if need_dweight else None
    launch(
        _backward_kernel,
        (programs,),
        x.device,
        dout,
        x,
        weight,
        cos,
        sin,
        dx,
        partials,
        all_tokens,
        tokens,
        *(stride for each in (dout, x, dx) for stride in _strides(each, heads_dim)),
        *_strides_of_angles(cos),
        eps,
        weight_offset,
        HEADS=x.shape[heads_dim],
        BLOCK=block,
        HALF=half,
        PAIRS=pairs,
        num_warps=warps,
    )
    if partials is not None:
        sum_partials(partials, dweight)
    return dx, dweight


_qk_norm_rope = register_op(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, "
    "float weight_offset, int heads_dim, ScalarType dtype) -> (Tensor, Tensor)",
    _forward,
    _empty,
)
_qk_norm_rope_backward = register_op(
    "qk_norm_rope_backward(Tensor dout, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps, "
    "float weight_offset, int heads_dim, bool need_dweight) -> (Tensor, Tensor)",
    _backward,
    _empty_backward,
)


# ----------------------------------------------------------------------------------------------------------- autograd


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norm: Norm,
        heads_dim: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.how = norm.eps, norm.weight_offset, heads_dim
        outputs = _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, *ctx.how, dtype)
        # As in stock: what is frozen going in is frozen coming out, and attention skips its gradient.
        needs = ctx.needs_input_grad
        ctx.mark_non_differentiable(*(out for i, out in enumerate(outputs) if not (needs[i] or needs[2 + i])))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor | None, dk: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        results: list[torch.Tensor | None] = [None] * 9
        for place, dout, x, weight in ((0, dq, q, q_weight), (1, dk, k, k_weight)):
            need_weight = ctx.needs_input_grad[2 + place]
            if dout is not None and (ctx.needs_input_grad[place] or need_weight):
                dx, dweight = _qk_norm_rope_backward(dout, x, weight, cos, sin, *ctx.how, need_weight)
                results[place] = dx if ctx.needs_input_grad[place] else None
                results[2 + place] = dweight if need_weight else None
        return tuple(results)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: Norm,
    *,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms each head of `q` and `k`, and rotates it by its position.

    Args:
        q, k: [B, heads, S, D] with unsqueeze_dim 1, [B, S, heads, D] with 2; k may have fewer heads.
        q_weight, k_weight: [D], frozen or trained.
        cos, sin: [B or 1, S, D].
        norm: of both.
        unsqueeze_dim: where the heads are.

    Returns:
        The rotated q and k, not in place.
    """
    if not _in_one_pass(q, k, q_weight, k_weight, cos, sin):
        q, k = norm_alone(q, q_weight, norm), norm_alone(k, k_weight, norm)
        rotated = rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        assert rotated[1] is not None
        return rotated[0], rotated[1]
    dtype = torch.promote_types(dtype_of(q.dtype, q_weight, norm.round_before_weight), cos.dtype)
    weights = q_weight.contiguous(), k_weight.contiguous()
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return _QKNormRope.apply(q, k, *weights, cos, sin, norm, unsqueeze_dim, dtype)


def norm_alone(x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The RMSNorm of x [..., D] without a rotation."""
    eps, weight_offset, round_before_weight = norm
    return rms_norm(x, weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight)


def _in_one_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> bool:
    """Whether the kernels take these; what does not fit at all is left to the ops that say so."""
    width = q.shape[-1]
    return (
        all(map(use_triton, (q, k, cos, sin, q_weight, k_weight)))
        and q.numel() > 0
        and k.numel() > 0
        and q.ndim == k.ndim == 4
        and k.shape[3] == width <= MAX_WIDTH
        and width % 2 == 0
        and cos.shape == sin.shape
        and cos.ndim == 3
        and cos.shape[2] == width
        and q_weight.shape == k_weight.shape == (width,)
        and q_weight.dtype == k_weight.dtype
        and q.dtype == k.dtype
    )
