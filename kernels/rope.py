"""Rotary position embedding of queries and keys, forward and backward, each in one launch.

Formula, for the pair (x1, x2) of elements that turn together, computed in float32 and rounded once:

    out1 = x1 * cos1 - x2 * sin1          dx1 = dout1 * cos1 + dout2 * sin2
    out2 = x2 * cos2 + x1 * sin2          dx2 = dout2 * cos2 - dout1 * sin1

R elements of each head turn, the other D - R pass through. Which elements pair up, and with which angles:

    half-rotate (Llama, Phi-3, Gemma, OLMo 2, ...)    x[i], x[i + R/2]    cos[i], cos[i + R/2]
    half_width (gpt-oss; cos holds R/2 angles)        x[i], x[i + R/2]    cos[i] for both
    interleaved (GLM, GLM-4)                          x[2i], x[2i + 1]    cos[i] for both; cos[R/2:] is not read

The two halves of cos are read as given: nothing says they are equal.

Shapes: q [B, heads, S, D] with unsqueeze_dim 1 or [B, S, heads, D] with 2, k alike with its own number of heads, or
None; cos and sin [B or 1, S, R] ([B or 1, S, R/2] with half_width). Outputs are dense in the memory order of the
inputs, and gradients too. q and k may have any strides with contiguous heads; others are copied first.
Dtypes: float16, bfloat16, float32 in any mix; float64 takes the torch reference. Outputs have dtype promote(q, cos),
which is what the modelling code gives, or that of the input with keep_dtype (OLMo 2 and 3 cast back).

Floor, for E = B * S * (q heads + k heads) * D elements: E * (e_in + e_out) bytes forward and again backward, plus cos
and sin once per token.

Raises ValueError for shapes or devices that do not fit and for cos or sin that require a gradient (none is computed),
TypeError for dtypes that are not floating point.

Source: Su et al., "RoFormer" (2021): a rotation by an angle per position and pair; its gradient is the transposed
rotation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import launch, once_differentiable, register_op, use_triton

# ---------------------------------------------------------------------------------------------------- torch reference


def _reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_dim: int,
    interleaved: bool,
    half_width: bool,
    inverse: bool,
    out: torch.Tensor,
) -> None:
    """Fills `out` with the rotation of `x`, or with the transposed one."""
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    cos, sin = cos.to(wide).unsqueeze(heads_dim), sin.to(wide).unsqueeze(heads_dim)
    rotary = cos.shape[-1] * (2 if half_width else 1)
    half = rotary // 2
    shared = interleaved or half_width
    cos1, sin1 = cos[..., :half], sin[..., :half]
    cos2, sin2 = (cos1, sin1) if shared else (cos[..., half:], sin[..., half:])
    if inverse:
        sin1, sin2 = -sin2, -sin1
    first, second = (slice(0, rotary, 2), slice(1, rotary, 2)) if interleaved else (slice(half), slice(half, rotary))
    x1, x2 = x[..., first].to(wide), x[..., second].to(wide)
    out[..., first] = x1 * cos1 - x2 * sin1
    out[..., second] = x2 * cos2 + x1 * sin2
    out[..., rotary:] = x[..., rotary:]


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _turn(
    x_ptr,
    out_ptr,
    x_head,
    out_head,
    cos1,
    sin1,
    cos2,
    sin2,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    PASS: tl.constexpr,
    PASS_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotates all heads of one token. HALF pairs (PAIRS with padding) turn, PASS elements (PASS_BLOCK) are copied."""
    pair = tl.arange(0, PAIRS)
    for start in tl.range(0, HEADS, HEAD_BLOCK):
        head = start + tl.arange(0, HEAD_BLOCK)
        # int64: a head's stride is S * D elements where heads are outside the sequence.
        x_base = x_ptr + head.to(tl.int64)[:, None] * x_head
        out_base = out_ptr + head.to(tl.int64)[:, None] * out_head
        in_heads = (head < HEADS)[:, None]
        mask = in_heads & (pair < HALF)[None, :]
        if INTERLEAVED:
            # Both elements of a pair in one wide load, parted in registers.
            column = tl.arange(0, 2 * PAIRS)[None, :]
            both = in_heads & (column < 2 * HALF)
            x = tl.load(x_base + column, mask=both, other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(x, (HEAD_BLOCK, PAIRS, 2)))
        else:
            x1 = tl.load(x_base + pair[None, :], mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x_base + HALF + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        # Which product is fused is said here, so that the bits do not depend on strides or on the compiler.
        out1 = tl.fma(x1, cos1, -(x2 * sin1))
        out2 = tl.fma(x2, cos2, x1 * sin2)
        if INTERLEAVED:
            out = tl.reshape(tl.join(out1, out2), (HEAD_BLOCK, 2 * PAIRS))
            tl.store(out_base + column, out.to(out_ptr.dtype.element_ty), mask=both)
        else:
            tl.store(out_base + pair[None, :], out1.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_base + HALF + pair[None, :], out2.to(out_ptr.dtype.element_ty), mask=mask)
        if PASS > 0:
            rest = tl.arange(0, PASS_BLOCK)[None, :]
            copied = in_heads & (rest < PASS)
            kept = tl.load(x_base + 2 * HALF + rest, mask=copied, other=0.0)
            tl.store(out_base + 2 * HALF + rest, kept.to(out_ptr.dtype.element_ty), mask=copied)


@triton.jit
def _kernel(
    q_ptr,
    k_ptr,
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
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    PASS: tl.constexpr,
    PASS_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SHARED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One token per program, all heads of q and k. SHARED: one angle for both elements of a pair."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    mask = pair < HALF
    angle = batch * cos_batch + token * cos_token + pair
    cos1 = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)[None, :]
    cos2 = cos1
    sin2 = sin1
    if not SHARED:
        cos2 = tl.load(cos_ptr + angle + HALF, mask=mask, other=0.0).to(tl.float32)[None, :]
        sin2 = tl.load(sin_ptr + angle + HALF, mask=mask, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        forward_sin1 = sin1
        sin1 = -sin2
        sin2 = -forward_sin1
    _turn(
        q_ptr + batch * q_batch + token * q_token,
        q_out_ptr + batch * q_out_batch + token * q_out_token,
        q_head,
        q_out_head,
        cos1,
        sin1,
        cos2,
        sin2,
        Q_HEADS,
        Q_BLOCK,
        HALF,
        PAIRS,
        PASS,
        PASS_BLOCK,
        INTERLEAVED,
    )
    if k_ptr is not None:
        _turn(
            k_ptr + batch * k_batch + token * k_token,
            k_out_ptr + batch * k_out_batch + token * k_out_token,
            k_head,
            k_out_head,
            cos1,
            sin1,
            cos2,
            sin2,
            K_HEADS,
            K_BLOCK,
            HALF,
            PAIRS,
            PASS,
            PASS_BLOCK,
            INTERLEAVED,
        )


def _next_power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _tile_of(heads: int, pairs: int) -> tuple[int, int]:
    """Heads at a time and warps: up to 4096 elements of the rotated part at once, 32 per thread."""
    block = min(_next_power_of_2(heads), max(1, 2048 // pairs))
    return block, max(1, min(4, block * pairs // 512))


# ---------------------------------------------------------------------------------------------------------------- ops


def _memory_order(x: torch.Tensor) -> list[int]:
    """Dimensions of `x`, outermost in memory first."""
    if x.is_contiguous():
        return [0, 1, 2, 3]
    strides = x.stride()
    return [*sorted(range(3), key=lambda dim: -strides[dim]), 3]


@functools.lru_cache(maxsize=256)
def _tiling(q_heads: int, k_heads: int, head_dim: int, angles: int, half_width: bool) -> dict[str, int]:
    """Constants of the kernel, and its warps."""
    half = angles if half_width else angles // 2
    rest, pairs = head_dim - 2 * half, _next_power_of_2(half)
    (q_block, q_warps), (k_block, k_warps) = _tile_of(q_heads, pairs), _tile_of(k_heads, pairs)
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "Q_BLOCK": q_block,
        "K_BLOCK": k_block,
        "HALF": half,
        "PAIRS": pairs,
        "PASS": rest,
        "PASS_BLOCK": _next_power_of_2(rest),
        "num_warps": max(q_warps, k_warps),
    }


def _empty(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_dim: int,
    interleaved: bool,
    half_width: bool,
    inverse: bool,
    q_order: list[int],
    k_order: list[int],
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out = torch.empty_permuted(q.shape, q_order, dtype=q_dtype, device=q.device)
    if k is None:
        return q_out, q.new_empty(0)
    return q_out, torch.empty_permuted(k.shape, k_order, dtype=k_dtype, device=k.device)


def _rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_dim: int,
    interleaved: bool,
    half_width: bool,
    inverse: bool,
    q_order: list[int],
    k_order: list[int],
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = _empty(q, k, cos, sin, heads_dim, interleaved, half_width, inverse, q_order, k_order, q_dtype, k_dtype)
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return outputs
    if not (use_triton(q) and use_triton(cos) and (k is None or use_triton(k))):
        for x, out in ((q, outputs[0]), (k, outputs[1])):
            if x is not None:
                _reference(x, cos, sin, heads_dim, interleaved, half_width, inverse, out)
        return outputs
    q_out, k_out = outputs[0], None if k is None else outputs[1]
    # A gradient arrives with whatever strides attention gave it.
    q = q if q.stride(3) == 1 else q.contiguous()
    k = k if k is None or k.stride(3) == 1 else k.contiguous()
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    token_dim = 3 - heads_dim
    shape, cos_strides, tokens = q.shape, cos.stride(), q.shape[token_dim]
    strides: list[int] = []
    for tensor in (q, k, q_out, k_out):
        of = (0, 0, 0, 0) if tensor is None else tensor.stride()
        strides += (of[0], of[token_dim], of[heads_dim])
    launch(
        _kernel,
        (shape[0] * tokens,),
        q.device,
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        tokens,
        *strides,
        cos_strides[0] if cos.shape[0] > 1 else 0,
        cos_strides[1],
        INTERLEAVED=interleaved,
        SHARED=interleaved or half_width,
        INVERSE=inverse,
        **_tiling(shape[heads_dim], 0 if k is None else k.shape[heads_dim], shape[3], cos.shape[2], half_width),
    )
    return outputs


_rope = register_op(
    "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, int heads_dim, bool interleaved, bool half_width, bool inverse, "
    "int[] q_order, int[] k_order, ScalarType q_dtype, ScalarType k_dtype) -> (Tensor, Tensor)",
    _rotate,
    _empty,
)


# ----------------------------------------------------------------------------------------------------------- autograd


class _Rope(torch.autograd.Function):
    """Saves cos and sin only, which all layers of a model share."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        heads_dim: int,
        interleaved: bool,
        half_width: bool,
        keep_dtype: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.how = (heads_dim, interleaved, half_width)
        ctx.orders = (_memory_order(q), [] if k is None else _memory_order(k))
        ctx.dtypes = (q.dtype, q.dtype if k is None else k.dtype)
        dtypes = ctx.dtypes if keep_dtype else [torch.promote_types(dtype, cos.dtype) for dtype in ctx.dtypes]
        q_out, k_out = _rope(q, k, cos, sin, *ctx.how, False, *ctx.orders, *dtypes)
        if k is None:
            return q_out
        # As in stock: what is frozen going in is frozen coming out, and attention skips its gradient.
        frozen = [out for out, needed in zip((q_out, k_out), ctx.needs_input_grad[:2], strict=True) if not needed]
        ctx.mark_non_differentiable(*frozen)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor | None, dk: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (q_order, k_order), (q_dtype, k_dtype) = ctx.orders, ctx.dtypes
        if not ctx.needs_input_grad[0]:
            dq = None
        if not ctx.needs_input_grad[1]:
            dk = None
        if dq is not None:
            both = _rope(dq, dk, cos, sin, *ctx.how, True, q_order, k_order, q_dtype, k_dtype)
            dq, dk = both[0], None if dk is None else both[1]
        elif dk is not None:
            dk, _ = _rope(dk, None, cos, sin, *ctx.how, True, k_order, [], k_dtype, k_dtype)
        return dq, dk, None, None, None, None, None, None


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    unsqueeze_dim: int = 1,
    interleaved: bool = False,
    half_width: bool = False,
    keep_dtype: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotates `q` and `k` by their positions.

    Args:
        q, k: [B, heads, S, D] with unsqueeze_dim 1, [B, S, heads, D] with 2; k may have fewer heads, or be None.
        cos, sin: [B or 1, S, R], R <= D; half as wide with half_width.
        unsqueeze_dim: where the heads are.
        interleaved: pairs are neighbours rather than half of R apart.
        half_width: cos and sin hold one angle per pair.
        keep_dtype: outputs have the dtype of the inputs rather than promote(input, cos).

    Returns:
        The rotated q and k, not in place; None for k if it was None.
    """
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope gives no gradient for cos and sin; detach them")
    angles, q_shape = cos.shape, q.shape
    if len(angles) != 3 or angles != sin.shape or cos.dtype != sin.dtype or cos.device != sin.device:
        raise ValueError(
            f"cos and sin must be alike, [batch, tokens, angles]; got {list(angles)} {cos.dtype} on {cos.device} and "
            f"{list(sin.shape)} {sin.dtype} on {sin.device}"
        )
    rotary = angles[2] * (2 if half_width else 1)
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        shape = x.shape
        if not (x.is_floating_point() and cos.is_floating_point()):
            raise TypeError(f"rope needs floating-point tensors, got {name} {x.dtype} and cos {cos.dtype}")
        if len(shape) != 4 or shape[3] != q_shape[3] or shape[0] != q_shape[0]:
            raise ValueError(f"q and k must be [batch, ., ., D] with one batch and D, got {name} {list(shape)}")
        if angles[0] not in (1, shape[0]) or angles[1] != shape[3 - unsqueeze_dim]:
            raise ValueError(f"cos {list(angles)} does not fit {name} {list(shape)}, unsqueeze_dim {unsqueeze_dim}")
        if rotary % 2 or not 0 < rotary <= shape[3]:
            raise ValueError(f"{rotary} rotated elements do not fit heads of {shape[3]}")
        if x.device != cos.device:
            raise ValueError(f"{name} is on {x.device}, cos on {cos.device}")
    if q.stride(3) != 1:
        q = q.contiguous()
    if k is not None and k.stride(3) != 1:
        k = k.contiguous()
    if k is None:
        return _Rope.apply(q, None, cos, sin, unsqueeze_dim, interleaved, half_width, keep_dtype), None
    return _Rope.apply(q, k, cos, sin, unsqueeze_dim, interleaved, half_width, keep_dtype)
